"""Command-line tools; `trainer` holds the modules that deepfm_train_eval.py and the tools stand on."""
