"""Nothing in the tests needs a network, and nothing of the user's surroundings changes them."""
import os

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", ACCELERATE_USE_CPU="true")
