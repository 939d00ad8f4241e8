"""What passes between stages: documents, tokenizer files, token shards and their reader, the model card. No torch."""
