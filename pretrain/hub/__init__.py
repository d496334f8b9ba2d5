"""How a model leaves and enters: exports that transformers loads without this code (export.py), published weights that come in
(published.py). Both go through safetensors files under the names that parameters have in model/."""
