"""Nothing in the tests needs a network, and nothing of the user's surroundings changes them."""
import os

REAL_DATA = os.environ.pop("UAT_REPRO_DATA_DIR", "")  # a folder with the real data sets, for the tests that look at them
os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", ACCELERATE_USE_CPU="true")

from hypothesis import settings

settings.register_profile("default", max_examples=200, deadline=None, derandomize=True)
settings.register_profile("soak", max_examples=1000, deadline=None)
settings.load_profile("default")

LONG = ("test_workflow.py", "test_experiments.py")  # begin first, so that no process is left alone with them


def pytest_collection_modifyitems(items): items.sort(key=lambda item: item.path.name not in LONG)
