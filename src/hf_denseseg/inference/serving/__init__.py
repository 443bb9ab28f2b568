"""A checkpoint behind a web page (Gradio) or an inference endpoint; both write what `denseseg predict` writes."""
