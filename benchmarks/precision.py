"""What bfloat16 does to the scores and to the mask: layers in bfloat16, with the head in float32 and with the head in bfloat16 too."""
import json

import torch
from scipy.stats import spearmanr

from uat_repro.head import predicting_states, scores_of, token_scores, valid_tokens
from uat_repro.masking import count_kept
from uat_repro.models import autocast, head_of, hidden_states
from variants import Work, lengths_of, make_model, make_rows


def overlap(a:torch.Tensor, b:torch.Tensor)->float:
    "Share of the tokens of either top quarter that are in both (Jaccard)."
    tops = [set(x.topk(count_kept(len(x), .25)).indices.tolist()) for x in (a, b)]
    return len(tops[0] & tops[1]) / len(tops[0] | tops[1])


@torch.no_grad()
def main():
    model, tokenizer = make_model("smollm2-135m")
    work, losses = Work(tokenizer, make_rows(tokenizer, model.config.vocab_size, 3, lengths_of(8, 40, 256), .72), 8), {"float32": [], "bfloat16": [], "head too": []}
    for batch in work.batches:
        valid = valid_tokens(batch["labels"])
        targets = batch["labels"][valid]
        for name in ("float32", "bfloat16"):
            with autocast(name): states = predicting_states(hidden_states(model, batch), valid)
            losses[name].append(token_scores(states, targets, head_of(model)).loss)
        logits = states.bfloat16() @ head_of(model).weight.bfloat16().T
        losses["head too"].append(-logits.log_softmax(-1).gather(-1, targets[:, None])[:, 0].float())
    exact, *others = (torch.cat(losses[k]) for k in losses)
    found = {k: dict(largest_difference=float((x - exact).abs().max()), mean_difference=float((x - exact).abs().mean()), spearman=float(spearmanr(x, exact).statistic),
                     overlap=overlap(x, exact), distinct=len(set(x.tolist())), tokens=len(x)) for k, x in zip(("bfloat16", "head too"), others)}
    print(json.dumps(found))


if __name__ == "__main__": main()
