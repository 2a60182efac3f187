"""The public names for type checkers and editors, which read and do not run: at run time they load on first use."""
from .records import load_records as load_records, to_messages as to_messages
from .tokens import (
    Collator as Collator, LengthSampler as LengthSampler, encode as encode, encode_all as encode_all,
    token_frame as token_frame,
)
from .models import (
    Head as Head, add_lora as add_lora, head_of as head_of, hidden_states as hidden_states,
    load_model as load_model, split_layers as split_layers,
)
from .cache import CachedDataset as CachedDataset, HiddenCache as HiddenCache
from .uncertainty import (
    Decomposition as Decomposition, Ensemble as Ensemble, MCDropout as MCDropout,
    TokenUncertainty as TokenUncertainty, decompose as decompose, score_tokens as score_tokens,
)
from .masking import select_tokens as select_tokens
from .distillation import (
    AdapterTeacher as AdapterTeacher, CachedTeacher as CachedTeacher, FrozenTeacher as FrozenTeacher,
)
from .rules import METRICS as METRICS, WEIGHTS as WEIGHTS, Metric as Metric, Weight as Weight
from .objective import Objective as Objective, ObjectiveOutput as ObjectiveOutput
from .compute_loss import as_compute_loss_func as as_compute_loss_func
from .training import AtSteps as AtSteps, TokenLog as TokenLog, UncertaintyAwareTrainer as UncertaintyAwareTrainer
from .evaluation import evaluate as evaluate, measure_baseline as measure_baseline
from .answers import exact_match as exact_match, join_layers as join_layers
from .sft import UncertaintyAwareSFTTrainer as UncertaintyAwareSFTTrainer

__version__: str
