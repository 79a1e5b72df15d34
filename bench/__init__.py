"""What is timed and what is checked on a GPU; run with ``python -m bench.NAME`` from the checkout."""
