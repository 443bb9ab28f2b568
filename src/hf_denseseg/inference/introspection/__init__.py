"""The internals of a model: attention, feature maps, position embeddings, class tokens, refinement."""
