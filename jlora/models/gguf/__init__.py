"""Models that are one GGUF file, as llama.cpp reads them: header, weights, and what a Hugging Face directory would hold."""
