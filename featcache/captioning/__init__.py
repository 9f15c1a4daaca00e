"""Parts of the caption job: the model and the list it writes."""
