"""What stages pass to one another: documents, tokenizer files, token shards and their reader, model card. No torch."""
