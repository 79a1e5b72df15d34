"""The commands of ``hmg-gpu``, and what train.py and eval.py share with them."""
