"""The effect of bfloat16 on scores and mask: layers in bfloat16, with the head in float32 or in bfloat16 too."""
import json

import torch
from scipy.stats import spearmanr

from uat_repro.tokens import lay_out
from uat_repro.head import token_scores
from uat_repro.masking import count_kept
from uat_repro.models import autocast, head_of, hidden_states
from variants import Work, lengths_of, make_model, make_rows


def overlap(a:torch.Tensor, b:torch.Tensor)->float:
    "Share of the tokens of either top quarter that are in both (Jaccard)."
    tops = [set(x.topk(count_kept(len(x), .25)).indices.tolist()) for x in (a, b)]
    return len(tops[0] & tops[1]) / len(tops[0] | tops[1])


def compared(x:torch.Tensor, exact:torch.Tensor)->dict:
    "How far scores are from the exact ones, and what that does to their ranks and to the mask."
    away = (x - exact).abs()
    return dict(largest_difference=float(away.max()), mean_difference=float(away.mean()),
                spearman=float(spearmanr(x, exact).statistic), overlap=overlap(x, exact),
                distinct=len(set(x.tolist())), tokens=len(x))


@torch.no_grad()
def main():
    model, tokenizer = make_model("smollm2-135m")
    work = Work(tokenizer, make_rows(tokenizer, model.config.vocab_size, 3, lengths_of(8, 40, 256), .72), 8)
    losses = {"float32": [], "bfloat16": [], "head too": []}
    for batch in work.batches:
        layout = lay_out(batch)
        for name in ("float32", "bfloat16"):
            with autocast(name): states = layout.predicting(hidden_states(model, batch))
            losses[name].append(token_scores(states, layout.targets, head_of(model)).loss)
        logits = states.bfloat16() @ head_of(model).weight.bfloat16().T
        losses["head too"].append(-logits.log_softmax(-1).gather(-1, layout.targets[:, None])[:, 0].float())
    exact, *others = (torch.cat(losses[k]) for k in losses)
    print(json.dumps({name: compared(x, exact) for name, x in zip(("bfloat16", "head too"), others)}))


if __name__ == "__main__": main()
