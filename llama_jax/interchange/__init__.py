"""LLaMA weights of others: Hugging Face's folders, Meta's pickles, and our own checkpoints.

Every format is a source of matrices, and a target for them: one array of one layer at a time, in
the shape that it has in our parameter tree. So each knows only its own names and layout, and a
conversion needs memory for one array, not for the model.
"""
