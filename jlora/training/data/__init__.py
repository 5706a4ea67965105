"""The data of a run: rows of files as examples, chats as text, batches in an order that can be resumed."""
