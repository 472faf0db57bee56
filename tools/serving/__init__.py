"""Using a trained model on rows of any form: what joins the encoders of tools/converter and the checkpoints."""
