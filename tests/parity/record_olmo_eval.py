"""Records what ai2-olmo-eval's own metric code says of made-up requests, for
tests/parity/test_olmo_eval.py.

    pip install torch torchmetrics && pip install --no-deps ai2-olmo-eval==0.9.0
    python tests/parity/record_olmo_eval.py

Run on 25 November 2026 with torch 2.13, torchmetrics 1.9 and ai2-olmo-eval 0.9.0. The
log-probabilities are of random logits.
"""

import json
from pathlib import Path

import numpy as np
import torch
from olmo_eval.metrics import ICLMetric  # pyright: ignore[reportMissingImports]

VOCABULARY, CONTEXT = 40, 3
WORDS = ("river", "Überfluß", "the old mill", "3.5 °C", "→ b", "a", "it was not there")


def main() -> None:
    rng = np.random.default_rng(0)
    requests, figures = [], {}
    for document in range(40):
        choices = int(rng.integers(2, 6))
        for choice in range(choices):
            words = " ".join(rng.choice(WORDS, rng.integers(1, 4)))
            tokens = rng.integers(0, VOCABULARY, rng.integers(1, 7)).tolist()
            logits = (2 * rng.standard_normal((CONTEXT + len(tokens), VOCABULARY))).astype(
                np.float32
            )
            label = int(rng.integers(choices)) if choice == 0 else requests[-1]["label"]
            at = logits[CONTEXT - 1 : CONTEXT + len(tokens) - 1].astype(np.float64)
            log_p = at - np.log(np.exp(at).sum(axis=-1, keepdims=True))
            total = sum(log_p[i, token] for i, token in enumerate(tokens))
            requests.append(
                {
                    "document": document,
                    "choice": choice,
                    "label": label,
                    "continuation": f" {words}",
                    "log_likelihood": total,
                }
            )
            requests[-1] |= {"tokens": tokens, "logits": logits}
    for metric in ("acc", "len_norm", "bpb"):
        upstream = ICLMetric(metric)
        for request in requests:
            if metric == "bpb" and request["choice"] != request["label"]:
                continue
            text, tokens = request["continuation"], torch.tensor(request["tokens"])
            batch = {
                "doc_id": torch.tensor([request["document"]]),
                "cont_id": torch.tensor([0 if metric == "bpb" else request["choice"]]),
                "label_id": torch.tensor([0 if metric == "bpb" else request["label"]]),
                "continuation": tokens[None],
                "ctx_len": torch.tensor([CONTEXT]),
                "cont_len": torch.tensor([len(tokens)]),
                "cont_str_len": torch.tensor([len(text)]),
                "cont_byte_len": torch.tensor([len(text.encode())]),
                "cont_str_len_no_leading_space": torch.tensor([len(text) - 1]),
                "cont_byte_len_no_leading_space": torch.tensor([len(text[1:].encode())]),
            }
            upstream.update(batch, torch.tensor(request["logits"])[None])
        figures[metric] = {name: float(value) for name, value in upstream.compute().items()}
    kept = [
        {key: value for key, value in request.items() if key not in ("tokens", "logits")}
        for request in requests
    ]
    Path(__file__).with_name("olmo_eval.json").write_text(
        json.dumps({"requests": kept, "figures": figures}, indent=0) + "\n"
    )
    print(figures)


if __name__ == "__main__":
    main()
