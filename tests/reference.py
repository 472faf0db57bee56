"""DeepFM's training step in float64 numpy, gradients by hand, written from the definitions and not from the trainer.

Sources: DeepFM (arXiv:1703.04247, eq. 1-4), Adam (arXiv:1412.6980, algorithm 1), Adagrad (Duchi et al., JMLR 12, 2011,
the diagonal form, with PyTorch's epsilon behind the root), batch normalisation (arXiv:1502.03167) with PyTorch's
momentum, epsilon and unbiased running variance, gradient clipping as torch.nn.utils.clip_grad_norm_.
Letters in shape comments: B rows, F fields, D embedding size, H hidden units, R table rows.
"""

import numpy as np

TABLES = ("embedding", "embedding_fm")
ADAGRAD_EPSILON = 1e-10
BATCH_NORM_EPSILON, BATCH_NORM_MOMENTUM = 1e-5, 0.1


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def second_order_by_loops(embeddings):
    """Inner products of all pairs of fields: (B, F, D) -> (B,)"""
    total = np.zeros(len(embeddings))
    for f in range(embeddings.shape[1]):
        for g in range(f + 1, embeddings.shape[1]):
            total += (embeddings[:, f] * embeddings[:, g]).sum(axis=1)
    return total


class Reference:
    """The model, its Adam state and one training step.

    parameters: {"embedding" (R, D), "embedding_fm" (R, 1), "weight_i" (out, in), "bias_i" (out,)}; with batch norm also
    "gamma_i", "beta_i", "running_mean_i", "running_var_i" (H,), and no bias in the hidden layers. lazy: Adam moves only
    the looked-up rows of the tables; efficient: in the form of section 2, as on CPU. Padding rows are simply not given.
    betas, epsilon: Adam's; adagrad: in its place.
    """

    def __init__(self, parameters, learning_rate, embedding_l2=0.0, max_grad_norm=0.0, betas=(0.9, 0.999), epsilon=1e-8,
                 adagrad=False):
        self.betas, self.epsilon, self.update = betas, epsilon, self.adagrad if adagrad else self.adam
        self.values = {name: np.array(value, np.float64) for name, value in parameters.items()}
        self.learning_rate, self.embedding_l2, self.max_grad_norm = learning_rate, embedding_l2, max_grad_norm
        self.lazy, self.efficient = embedding_l2 == 0 and max_grad_norm == 0, True
        self.num_hidden = sum(name.startswith("weight_") for name in self.values) - 1
        self.batch_norm = "gamma_0" in self.values
        self.m = {name: np.zeros_like(value) for name, value in self.trained()}
        self.v = {name: np.zeros_like(value) for name, value in self.trained()}
        self.step = 0

    def trained(self):
        return [(name, value) for name, value in self.values.items() if not name.startswith("running_")]

    # --- forward ------------------------------------------------------------------------------------------------------

    def logits(self, ids, training=False, masks=None, keep=1.0):
        """ids (B, F), masks (B, H) of 0 and 1 per layer, keep: share of ones -> ((B,), inputs for `gradients`)"""
        embeddings = self.values["embedding"][ids]  # (B, F, D)
        x = embeddings.reshape(len(ids), -1)
        cache = []
        for i in range(self.num_hidden):
            y = x @ self.values[f"weight_{i}"].T
            if self.batch_norm:
                y, normal, std = self.normalise(i, y, training)
            else:
                y, normal, std = y + self.values[f"bias_{i}"], None, None
            factor = (y > 0) * (1.0 if masks is None else masks[i] / keep)  # ReLU and dropout
            cache.append((x, normal, std, factor))
            x = y * factor
        cache.append(x)
        last = self.num_hidden
        dnn = (x @ self.values[f"weight_{last}"].T + self.values[f"bias_{last}"])[:, 0]
        first_order = self.values["embedding_fm"][ids][:, :, 0].sum(axis=1)
        return first_order + second_order_by_loops(embeddings) + dnn, cache

    def normalise(self, i, y, training):
        mean, var = self.values[f"running_mean_{i}"], self.values[f"running_var_{i}"]
        if training:
            mean, var = y.mean(axis=0), y.var(axis=0)
            for name, new in (("mean", mean), ("var", y.var(axis=0, ddof=1))):
                old = self.values[f"running_{name}_{i}"]
                self.values[f"running_{name}_{i}"] = (1 - BATCH_NORM_MOMENTUM) * old + BATCH_NORM_MOMENTUM * new
        std = np.sqrt(var + BATCH_NORM_EPSILON)
        normal = (y - mean) / std
        return self.values[f"gamma_{i}"] * normal + self.values[f"beta_{i}"], normal, std

    # --- backward -----------------------------------------------------------------------------------------------------

    def gradients(self, ids, dlogits, cache):
        """dlogits (B,): derivative of the loss by the logits -> {name: gradient}"""
        grads = {}
        last = self.num_hidden
        grads[f"weight_{last}"] = dlogits[None, :] @ cache[last]
        grads[f"bias_{last}"] = dlogits.sum(keepdims=True)
        dx = dlogits[:, None] * self.values[f"weight_{last}"]
        for i in reversed(range(self.num_hidden)):
            x, normal, std, factor = cache[i]
            dy = dx * factor
            if self.batch_norm:
                grads[f"gamma_{i}"], grads[f"beta_{i}"] = (dy * normal).sum(axis=0), dy.sum(axis=0)
                dn = dy * self.values[f"gamma_{i}"]
                dy = (dn - dn.mean(axis=0) - normal * (dn * normal).mean(axis=0)) / std
            else:
                grads[f"bias_{i}"] = dy.sum(axis=0)
            grads[f"weight_{i}"] = dy.T @ x
            dx = dy @ self.values[f"weight_{i}"]
        embeddings = self.values["embedding"][ids]
        others = embeddings.sum(axis=1, keepdims=True) - embeddings  # a field's partners in the second-order term
        per_lookup = {"embedding": dx.reshape(embeddings.shape) + dlogits[:, None, None] * others,
                      "embedding_fm": np.broadcast_to(dlogits[:, None, None], (*ids.shape, 1))}
        for name in TABLES:
            grads[name] = self.embedding_l2 * self.values[name]
            np.add.at(grads[name], ids, per_lookup[name])
        return grads

    def clip(self, grads):
        norm = np.sqrt(sum((grad**2).sum() for grad in grads.values()))
        factor = min(1.0, self.max_grad_norm / (norm + 1e-6))
        return {name: grad * factor for name, grad in grads.items()}

    # --- update -------------------------------------------------------------------------------------------------------

    def adam(self, grads, ids):
        self.step += 1
        beta1, beta2 = self.betas
        for name, value in self.trained():
            lazy = self.lazy and name in TABLES
            rows = np.unique(ids) if lazy else slice(None)
            m = self.m[name][rows] = beta1 * self.m[name][rows] + (1 - beta1) * grads[name][rows]
            v = self.v[name][rows] = beta2 * self.v[name][rows] + (1 - beta2) * grads[name][rows] ** 2
            correction = np.sqrt(1 - beta2**self.step)
            # epsilon stands beside the uncorrected root in the "efficient" form of Adam
            epsilon = self.epsilon / correction if lazy and self.efficient else self.epsilon
            value[rows] -= self.learning_rate * m / (1 - beta1**self.step) / (np.sqrt(v) / correction + epsilon)

    def adagrad(self, grads, ids):
        for name, value in self.trained():
            self.v[name] += grads[name] ** 2
            value -= self.learning_rate * grads[name] / (np.sqrt(self.v[name]) + ADAGRAD_EPSILON)

    def train(self, ids, labels, masks=None, keep=1.0, weights=None):
        """One step on ids (B, F) and labels (B,), weights (B,) of the rows in the loss (None: all 1).

        Returns the mean logloss before it, without the L2 term.
        """
        weights = np.ones(len(ids)) if weights is None else np.array(weights, np.float64)
        logits, cache = self.logits(ids, True, masks, keep)
        loss = (weights * (np.logaddexp(0, logits) - labels * logits)).sum() / weights.sum()
        grads = self.gradients(ids, weights * (sigmoid(logits) - labels) / weights.sum(), cache)
        self.update(self.clip(grads) if self.max_grad_norm > 0 else grads, ids)
        return loss
