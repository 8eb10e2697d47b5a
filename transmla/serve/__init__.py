"""Run exports in other runtimes: what llama.cpp and vLLM need to read them."""
