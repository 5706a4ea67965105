"""What `make_combine.py` has PEFT combine, and how; `tests/test_combine.py` does the same."""

LAYERS = {"up": (6, 10), "down": (10, 5)}
ADAPTERS = {"one": (2, 4.0, ["up", "down"]), "two": (2, 1.0, ["up", "down"]), "three": (2, 2.0, ["up"])}
WEIGHTS = [0.8, -0.5, 1.2]
# name: the combination and its options
CASES = {
    "cat": {},
    "linear": {},
    "svd": {"svd_rank": 2},
    "svd of more ranks": {"svd_rank": 5},
    "svd clipped": {"svd_rank": 2, "svd_clamp": 0.9},
    "magnitude_prune": {"density": 0.4},
    "ties": {"density": 0.7},
    "ties by frequency": {"density": 0.7, "majority_sign_method": "frequency"},
    "dare_linear": {"density": 1.0},
    "dare_ties": {"density": 1.0},
    "magnitude_prune_svd": {"density": 0.4, "svd_rank": 2},
    "ties_svd": {"density": 0.7, "svd_rank": 2},
    "ties_svd by frequency": {"density": 0.7, "svd_rank": 2, "majority_sign_method": "frequency"},
    "dare_linear_svd": {"density": 1.0, "svd_rank": 2},
    "dare_ties_svd": {"density": 1.0, "svd_rank": 2},
}
