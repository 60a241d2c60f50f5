"""Quantile forests: trees grown for the mean, quantiles from the rows that share a leaf."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import numpy as np

from poise.errors import FileError, require
from poise_quantagg.base.regressor import QuantileRegressor

_ROUTING = ("left_child", "right_child", "feature", "threshold", "missing_go_to_left")


class ForestRegressor(QuantileRegressor):
    """Random forest or extra trees with Meinshausen weights, over the quantile-forest package.

    Every row of a leaf is kept (the package keeps one at random by default) and counts one over
    the leaf's size, as in Meinshausen 2006. Any level can be asked for. Sample weights shape the
    trees (splits, and with recent scikit-learn the bootstrap), not the quantiles within leaves.
    """

    def __init__(
        self, *, levels, n_estimators, min_samples_leaf, max_depth, max_features, random_state,
        kind,
    ):
        self.levels = levels
        self.n_estimators = n_estimators
        self.min_samples_leaf = min_samples_leaf
        self.max_depth = max_depth
        self.max_features = max_features
        self.random_state = random_state
        self.kind = kind

    def _fit(self, X, y, sample_weight) -> None:
        self.forest_ = self._unfitted().fit(X, y, sample_weight=sample_weight)

    def _unfitted(self) -> Any:
        """Return the package's forest with these options."""
        package = require("quantile_forest", "quantagg")
        classes = {
            "random": package.RandomForestQuantileRegressor,
            "extra": package.ExtraTreesQuantileRegressor,
        }
        options = self.get_params()
        del options["levels"]
        return classes[options.pop("kind")](**options, max_samples_leaf=None, n_jobs=1)

    def _predict(self, X, levels) -> np.ndarray:
        q = self.forest_.predict(X, quantiles=levels.tolist(), weighted_leaves=True)
        return np.reshape(q, (len(X), len(levels)))  # one level comes back as (n,)

    def __getstate__(self):
        """Return the state with the leaves as arrays.

        The package's own object refuses the read-only arrays that joblib maps from a file.
        """
        state = dict(super().__getstate__())
        if "forest_" in state:
            forest = state["forest_"] = copy.copy(self.forest_)
            leaves = forest.__dict__.pop("forest_")
            state["leaves"] = tuple(np.asarray(part) for part in leaves.__reduce__()[1][:3])
        return state

    def __setstate__(self, state):
        """Rebuild the package's object from copies, which are writable."""
        state = dict(state)
        leaves = state.pop("leaves", None)
        super().__setstate__(state)
        if leaves is not None:
            self.forest_.forest_ = _leaf_store(*(part.copy() for part in leaves))

    def tensors(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Return what `from_tensors` needs: arrays, and plain values.

        Of the trees only what routes a row to its leaf, of the leaves the ranks of their rows: the nodes
        of all trees one after another, `sizes` of them in each tree and `counts` rows in each node.
        """
        targets, leaves, _ = (np.asarray(part) for part in self.forest_.forest_.__reduce__()[1][:3])
        states = [tree.tree_.__getstate__() for tree in self.forest_.estimators_]
        nodes = np.concatenate([state["nodes"] for state in states])
        arrays = {name: np.ascontiguousarray(nodes[name]) for name in _ROUTING}
        sizes = np.array([state["node_count"] for state in states])
        own = np.concatenate([tree[:size, 0] for tree, size in zip(leaves, sizes)])
        arrays |= {
            "sizes": sizes, "depths": np.array([state["max_depth"] for state in states]),
            "counts": (own > 0).sum(axis=1), "rows": own[own > 0].astype(np.int32), "targets": targets[0],
        }
        options = self.get_params(deep=False) | {"levels": self.levels_.tolist()}
        return arrays, {"options": options, "n_features": self.n_features_in_}

    @classmethod
    def from_tensors(cls, arrays: Mapping[str, np.ndarray], meta: Mapping[str, Any]) -> ForestRegressor:
        """Rebuild what `tensors` returned.

        Raises
        ------
        FileError
            For arrays that make no forest.
        """
        model = cls(**meta["options"])
        model.levels_ = np.asarray(meta["options"]["levels"], dtype=float)
        model.n_features_in_ = d = int(meta["n_features"])
        sizes = _checked(arrays, d)
        ends = np.cumsum(sizes)
        forest = model._unfitted()
        forest.estimators_ = [
            _tree(arrays, slice(end - size, end), depth, d, forest.estimator)
            for size, end, depth in zip(sizes, ends, arrays["depths"])
        ]
        forest.n_features_in_, forest.n_outputs_ = d, 1
        forest.n_train_samples_, forest.unsampled_indices_ = len(arrays["targets"]), None
        forest.forest_ = _leaf_store(arrays["targets"][None].copy(), _leaves(arrays, sizes),
                                     np.empty((0, 0, 0)))
        model.forest_ = forest
        return model


def _leaf_store(targets: np.ndarray, leaves: np.ndarray, bounds: np.ndarray) -> Any:
    fast = require("quantile_forest._quantile_forest_fast", "quantagg")
    return fast.QuantileForest(targets, leaves, bounds)


def _checked(arrays: Mapping[str, np.ndarray], d: int) -> np.ndarray:
    """Return the nodes of each tree, once every index is known to stay inside its array.

    Children that come after their parent, as scikit-learn writes them, cannot make a cycle.
    """
    left, right, feature, sizes, counts, rows, targets = (
        arrays[k] for k in ("left_child", "right_child", "feature", "sizes", "counts", "rows", "targets"))
    whole = ("left_child", "right_child", "feature", "sizes", "depths", "counts", "rows")
    kinds = all(arrays[k].dtype.kind == "i" and arrays[k].ndim == 1 for k in whole)
    total = int(sizes.sum()) if kinds and (sizes > 0).all() else -1
    lengths = {len(arrays[k]) for k in (*_ROUTING, "counts")}
    if lengths != {total} or len(arrays["depths"]) != len(sizes) or not len(sizes):
        raise FileError("a saved forest is damaged: its arrays have other sizes than its trees")
    size = np.repeat(sizes, sizes)
    own = np.arange(total) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    inner = left != -1
    routed = [(child[inner] > own[inner]) & (child[inner] < size[inner]) for child in (left, right)]
    if not (np.all(routed) and (right[~inner] == -1).all() and (feature[inner] >= 0).all()
            and (feature[inner] < d).all() and not np.isnan(arrays["threshold"]).any()):
        raise FileError("a saved forest is damaged: a node leads out of its tree")
    if not ((counts >= 0).all() and counts.sum() == len(rows) and (rows > 0).all()
            and (rows <= len(targets)).all() and targets.ndim == 1 and targets.dtype == np.float64
            and np.isfinite(targets).all()):
        raise FileError("a saved forest is damaged: a leaf holds rows that are not there")
    return sizes


def _tree(arrays: Mapping[str, np.ndarray], part: slice, depth: int, d: int, kind: Any) -> Any:
    """Return a fitted tree that routes rows as the saved one did."""
    module = require("sklearn.tree._tree", "quantagg")
    tree = module.Tree(d, np.array([1], dtype=np.intp), 1)
    nodes: Any = np.zeros(part.stop - part.start, dtype=module.NODE_DTYPE)
    for name in _ROUTING:
        nodes[name] = arrays[name][part]
    tree.__setstate__({"max_depth": int(depth), "node_count": len(nodes), "nodes": nodes,
                       "values": np.zeros((len(nodes), 1, 1))})
    grown = require("sklearn.base", "quantagg").clone(kind)
    grown.n_features_in_, grown.n_outputs_, grown.tree_ = d, 1, tree
    return grown


def _leaves(arrays: Mapping[str, np.ndarray], sizes: np.ndarray) -> np.ndarray:
    """Return the rows of every leaf, (trees, nodes, 1, rows), padded by zeros."""
    counts = arrays["counts"]
    tree = np.repeat(np.arange(len(sizes)), sizes)
    node = np.arange(len(counts)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    place = np.arange(len(arrays["rows"])) - np.repeat(np.cumsum(counts) - counts, counts)
    leaves = np.zeros((len(sizes), sizes.max(), 1, max(1, counts.max())), dtype=np.intp)
    leaves[np.repeat(tree, counts), np.repeat(node, counts), 0, place] = arrays["rows"]
    return leaves
