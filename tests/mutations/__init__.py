"""Small faults, put into jlora one at a time: which of them does the suite notice?"""
