"""Dense prediction for transformers: DSCT, SETR + HLG, UN-EPT and HFGD."""

__version__ = "0.1.0"
