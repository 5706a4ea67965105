"""What the commands beside `finetune` do."""
