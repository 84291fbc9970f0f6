"""A distributed pretraining pipeline that reproduces GPT-2."""
