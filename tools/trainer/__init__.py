"""What deepfm_train_eval.py and the tools stand on, one job a module; the README's code map lists them."""
