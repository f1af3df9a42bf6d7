"""Prototypes, attention and slots of SlotCon."""

import math

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def unit(vector: Array, eps: float = 1e-12) -> Array:
    """v / |v|, with |v| at least `eps`."""
    vector = np.asarray(vector, dtype=np.float64)
    return vector / max(math.sqrt(float(np.dot(vector, vector))), eps)


def softmax(logits: Array) -> Array:
    """exp(l_k) / sum_j exp(l_j) of one vector."""
    logits = np.asarray(logits, dtype=np.float64)
    weights = np.array([math.exp(logit - logits.max()) for logit in logits])
    return weights / weights.sum()


def cosine_scores(features: Array, prototypes: Array) -> Array:
    """s[b,k,h,w] = cos(prototype_k, z[b,:,h,w]): (B,D,H,W) and (K,D) to (B,K,H,W)."""
    B, _, H, W = features.shape
    K = len(prototypes)
    directions = [unit(prototype) for prototype in prototypes]
    scores = np.zeros((B, K, H, W))
    for b in range(B):
        for h in range(H):
            for w in range(W):
                z = unit(features[b, :, h, w])
                for k in range(K):
                    scores[b, k, h, w] = np.dot(directions[k], z)
    return scores


def attention(scores: Array, temperature: float = 0.07) -> Array:
    """a = softmax_k(s / temperature) + 1e-6: (B,K,H,W) to (B,K,H,W)."""
    B, _, H, W = scores.shape
    weights = np.zeros(scores.shape)
    for b in range(B):
        for h in range(H):
            for w in range(W):
                weights[b, :, h, w] = softmax(np.asarray(scores[b, :, h, w], np.float64) / temperature) + 1e-6
    return weights


def slots(features: Array, scores: Array, temperature: float = 0.07) -> Array:
    """q[b,k] = sum_hw z a / sum_hw a, with z not normalized: (B,D,H,W) and (B,K,H,W) to (B,K,D)."""
    B, D, H, W = features.shape
    K = scores.shape[1]
    weights = attention(scores, temperature)
    result = np.zeros((B, K, D))
    for b in range(B):
        for k in range(K):
            total, share = np.zeros(D), 0.0
            for h in range(H):
                for w in range(W):
                    total += weights[b, k, h, w] * np.asarray(features[b, :, h, w], dtype=np.float64)
                    share += weights[b, k, h, w]
            result[b, k] = total / share
    return result


def occupied(scores: Array) -> NDArray[np.bool_]:
    """Slot k of image b is occupied when argmax_k s[b,:,h,w] is k at some position: (B,K,H,W) to (B,K)."""
    B, K, H, W = scores.shape
    result = np.zeros((B, K), dtype=bool)
    for b in range(B):
        for h in range(H):
            for w in range(W):
                result[b, int(np.argmax(scores[b, :, h, w]))] = True
    return result
