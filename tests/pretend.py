"""A pretended GPU, for machines that have none.

Its tensors report a device of their own and hold CPU data. As on CUDA, an operation that mixes them with CPU tensors
fails (numbers without a dimension may be mixed), and for some operations the processor would have to wait: `WAITS`
counts those. It is for a process of its own, since it changes what PyTorch believes about the machine.
"""
from collections import Counter

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend


class Backend:
    "What PyTorch asks a kind of device for."
    def is_initialized(self): return True
    def is_available(self): return True
    def device_count(self): return 1
    def current_device(self): return 0
    def manual_seed_all(self, seed): pass
    def _is_in_bad_fork(self): return False
    def get_amp_supported_dtype(self): return [torch.bfloat16, torch.float32]
    def get_rng_state(self, device=None): return torch.get_rng_state()
    def set_rng_state(self, state, device=None): pass


_setup_privateuseone_for_python_backend("pretended", Backend())
DEVICE = torch.device("pretended:0")
CPU = torch.device("cpu")
WAITS: Counter = Counter()  # operation -> how often the processor would have waited for its result
WAITING = {"aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::bincount", "aten::equal",
           "aten::repeat_interleave", "aten::_unique2", "aten::unique_dim"}
INDEXING = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}
COPYING = {"aten::copy_", "aten::_to_copy", "aten::_copy_from"}


def is_there(device) -> bool: return device is not None and torch.device(device).type == DEVICE.type


class There(torch.Tensor):
    "A tensor on the pretended GPU; `held` has its data."
    held: torch.Tensor
    __slots__ = ["held"]

    @staticmethod
    def __new__(cls, held, requires_grad=False):
        self = torch.Tensor._make_wrapper_subclass(
            cls, held.size(), strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype,
            device=DEVICE, requires_grad=requires_grad)
        self.held = held.detach()
        return self

    def __repr__(self, **_): return f"There({self.held})"
    @classmethod
    def __torch_dispatch__(cls, op, types, args=(), kwargs=None): return run(op, args, kwargs or {})

    def __deepcopy__(self, memo):
        if id(self) not in memo:
            copy = There(self.held.clone())
            if isinstance(self, torch.nn.Parameter): copy = torch.nn.Parameter(copy, self.requires_grad)
            memo[id(self)] = copy
        return memo[id(self)]

    def tolist(self):
        WAITS["tolist"] += 1
        return self.held.tolist()

    def numpy(self, *_, **__): raise TypeError("can't convert a tensor of a GPU to numpy: use .cpu() first")
    __array__ = numpy

    def new_tensor(self, data, *, dtype=None, device=None, requires_grad=False):
        made = torch.as_tensor(data, dtype=dtype or self.dtype)
        return There(made) if is_there(device or DEVICE) else made


def check_mixture(op: str, args, there: list, here: list) -> None:
    "Raise where CUDA would: a CPU tensor beside those of the GPU, but for numbers, copies and indices of CPU tensors."
    positions = tree_leaves(args[1]) if op in INDEXING and isinstance(args[0], There) else []
    foreign = [x for x in here if x.dim() and not any(x is p for p in positions)]
    if op in INDEXING and not isinstance(args[0], There): foreign = here
    if foreign and op not in COPYING:
        raise RuntimeError(f"expected all tensors on one device, but {op} was given some of {DEVICE} and of the CPU")


def count_waits(op: str, args, target) -> None:
    by_mask = op in INDEXING and any(x.dtype == torch.bool for x in tree_leaves(args[1]) if torch.is_tensor(x))
    to_cpu = (op == "aten::_to_copy" and target is not None and not is_there(target)) or (
        op == "aten::copy_" and not isinstance(args[0], There))
    if op in WAITING or by_mask or to_cpu: WAITS[op] += 1


def run(op, args, kwargs):
    "Run an operation on the data of its tensors; the result is where the GPU would have it."
    name, tensors, target = op._schema.name, [x for x in tree_leaves((args, kwargs)) if torch.is_tensor(x)], kwargs.get("device")
    there, here = [x for x in tensors if isinstance(x, There)], [x for x in tensors if not isinstance(x, There)]
    if there:
        check_mixture(name, args, there, here)
        count_waits(name, args, target)
        if kwargs.get("generator") is not None: raise RuntimeError("a generator of the CPU draws nothing on a GPU")
    arrives = is_there(target) if target is not None else bool(there) and name != "aten::_local_scalar_dense"
    if name == "aten::copy_": arrives = isinstance(args[0], There)
    known = {id(x.held): x for x in there} | {id(x): x for x in here}
    def data(x): return x.held if isinstance(x, There) else CPU if isinstance(x, torch.device) and is_there(x) else x
    plain, more = tree_map(data, (args, {k: v for k, v in kwargs.items() if k != "pin_memory"}))
    if target is not None: more["device"] = CPU
    with torch.no_grad(): found = op(*plain, **more)
    def place(x): return known.get(id(x), There(x) if arrives else x) if torch.is_tensor(x) else x
    return tree_map(place, found)


class Pretending(TorchDispatchMode):
    "Inside, tensors may also be made on the pretended GPU, and `.to` brings them there."
    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        used = any(isinstance(x, There) for x in tree_leaves((args, kwargs))) or is_there(kwargs.get("device"))
        return run(op, args, kwargs) if used else op(*args, **kwargs)


_tensor = torch.tensor
def _make(data, *, device=None, **more):
    "`torch.tensor`, which makes its result before any dispatch."
    made = _tensor(data, **more)
    return There(made) if is_there(device) else made
torch.tensor = _make


def move(x):
    "A model (in place, tied weights once), a tensor or a batch, on the pretended GPU."
    if isinstance(x, dict): return {k: move(v) for k, v in x.items()}
    if isinstance(x, torch.Tensor): return There(x)
    if not isinstance(x, torch.nn.Module): return x
    moved = {}
    for module in x.modules():
        for kind in (module._parameters, module._buffers):
            for name, old in kind.items():
                if old is None or isinstance(old, There): continue
                new = There(old.detach().clone())
                if isinstance(old, torch.nn.Parameter): new = torch.nn.Parameter(new, old.requires_grad)
                kind[name] = moved.setdefault(id(old), new)
    return x


_to = torch.nn.Module.to
def _bring(module, *args, **kwargs):
    "`Module.to`, which would give tied weights a tensor each, as it cannot swap the data of another kind of tensor."
    return move(module) if is_there(torch._C._nn._parse_to(*args, **kwargs)[0]) else _to(module, *args, **kwargs)
torch.nn.Module.to = _bring
