"""What every model keeps."""

from __future__ import annotations

from typing import Any

import numpy as np

from poise.interfaces import form_of
from poise.testing.faults import expect, expect_methods, expect_refusal


def check_model(component: Any, task: str) -> list[str]:
    """Run a model component through the contract of its task.

    Parameters
    ----------
    component : Model
    task : classification, causal_lm, quantile or serving

    Returns
    -------
    list of str
        The checks that were made, in order.

    Raises
    ------
    ContractError
        Naming the first fault.
    """
    expect_methods(component, ("build",), "the model component")
    kits = {"classification": _classifier, "causal_lm": _causal_lm, "quantile": _quantile,
            "serving": _serving}
    expect(task in kits, f"there is no kit for the task {task!r}")
    form = {"quantile": "quantile", "serving": "served"}.get(task, "neural")
    expect(form_of(component) == form, f"form is {form_of(component)!r}, and the task {task} takes "
                                       f"{form!r}: a class attribute says it")
    return kits[task](component)


def _classifier(component: Any) -> list[str]:
    import torch

    model = _built_twice(component)
    shape = _input_shape(model)
    x = torch.randn(5, *shape, generator=torch.Generator().manual_seed(0))
    model.eval()
    out = model(x)
    expect(out.ndim == 2 and out.shape[0] == 5,
           f"a classifier returns (batch, classes), not {tuple(out.shape)}")
    expect(torch.allclose(model(x[2:3]), out[2:3], atol=1e-4), "a row's output depends on the batch")
    _trains(model, out.square().sum())
    _walk_is_whole(model)
    return ["two builds alike", "logits", "rows apart", "trains", "the walk is whole"]


def _input_shape(model: Any) -> tuple[int, ...]:
    """Return a fitting input shape from the first layer."""
    from torch import nn

    for module in model.modules():
        if isinstance(module, nn.Linear):
            return (module.in_features,)
        if isinstance(module, nn.Conv2d):
            return (module.in_channels, 12, 12)
    return (1,)


def _causal_lm(component: Any) -> list[str]:
    import torch

    expect_methods(component, ("tokenizer",), "a causal language model component")
    model = _built_twice(component)
    tokenizer = component.tokenizer()
    text = "Weights on a balance, 3 + 4 = 7."
    ids = tokenizer.encode(text)
    expect(tokenizer.decode(ids) == text, "the tokenizer does not decode what it encodes")
    expect(isinstance(tokenizer.eos_id, int), "the tokenizer has no end token")
    batch = torch.tensor([ids])
    model.eval()
    logits = model(input_ids=batch).logits
    expect(logits.shape[:2] == batch.shape, "logits are not (batch, time, vocab)")
    expect(max(*ids, tokenizer.eos_id) < logits.shape[-1], "the tokenizer has ids beyond the vocabulary")
    changed = batch.clone()
    changed[0, -1] = (changed[0, -1] + 1) % logits.shape[-1]
    same = torch.allclose(model(input_ids=changed).logits[:, :-1], logits[:, :-1], atol=1e-4)
    expect(same, "the model is not causal: a later token changes earlier logits")
    _trains(model, logits.float().logsumexp(-1).sum())
    _walk_is_whole(model)
    return ["two builds alike", "tokenizer", "logits", "causal", "trains", "the walk is whole"]


def _serving(component: Any) -> list[str]:
    """Hold a served model against a second one: what it says is a function of its options."""
    from poise.testing.served import check_served

    expect_methods(component, ("tokenizer",), "a component for served models")
    text = "Weights on a balance, 3 + 4 = 7."
    tokenizer = component.tokenizer()
    expect(tokenizer.decode(tokenizer.encode(text)) == text,
           "the tokenizer does not decode what it encodes")
    with component.build() as other:
        return ["tokenizer", *check_served(component.build, other)]


def _built_twice(component: Any) -> Any:
    """Build twice from the same seed and check that the models are the same."""
    import torch

    models = []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(component.build())
    first, second = (m.state_dict() for m in models)
    expect(first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first),
           "building twice from the same seed gives different models")
    return models[0]


def _trains(model: Any, loss: Any) -> None:
    expect(loss.requires_grad, "no parameter gets a gradient")
    loss.backward()
    got = [p for p in model.parameters() if p.requires_grad and p.grad is not None]
    expect(bool(got), "no parameter gets a gradient")
    model.zero_grad()


def _walk_is_whole(model: Any) -> None:
    from poise.walk import weights

    met = sum(w.numel for w in weights(model) if not w.lies_in)  # what lies in a file is no parameter
    unique = {id(p): p for n, p in model.named_parameters() if p.ndim > 1 and not n.endswith("bias")}
    held = sum(p.numel() for p in unique.values())
    expect(met == held, f"the walk meets {met} weights of {held}: some are missed or met twice")


def _quantile(component: Any) -> list[str]:
    rng = np.random.default_rng(0)
    X = rng.normal(size=(120, 3))
    y = X[:, 0] + 0.3 * rng.normal(size=120)
    model = component.build()
    expect_methods(model, ("levels", "fit", "predict_quantiles"), "a quantile model")
    levels = np.asarray(model.levels)
    expect(bool((np.diff(levels) > 0).all() and levels[0] > 0 and levels[-1] < 1),
           "levels do not increase inside (0, 1)")
    model.fit(X, y)
    out = model.predict_quantiles(X)
    expect(out.shape == (120, len(levels)), f"predict_quantiles has shape {out.shape}, not (n, m)")
    expect(bool(np.isfinite(out).all()), "predict_quantiles holds NaN or Inf")
    expect(bool((np.diff(out.mean(0)) > 0).all()),
           "the level order is ignored: predictions at higher levels are not higher on average")
    other = component.build()
    other.fit(X, y)
    expect(np.array_equal(other.predict_quantiles(X), out), "fitting twice on the same data differs")
    error = np.abs(out[:, len(levels) // 2] - y).mean() / np.abs(y - np.median(y)).mean()
    expect(error < 1.0, "the median prediction is no better than a constant")
    expect_refusal(lambda: model.predict_quantiles(X[:, :2]), "another number of columns is accepted")
    return ["levels", "predictions", "level order", "two fits alike", "better than a constant",
            "refuses other columns"]
