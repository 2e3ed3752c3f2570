"""Accelerated magnetic resonance imaging: SENSE with a learnable transform (Dao et al. 2022), and a U-Net beside it."""

from __future__ import annotations

import dataclasses

from ..problems.mri.recipe import MriRecipe


def mri_monarch_sense() -> MriRecipe:
    """SENSE with a learnable Monarch inverse Fourier transform, 8 coils, 4x."""
    return MriRecipe(
        name="mri_monarch_sense", steps=1000, batch=16, lr=1e-3, weight_decay=0.0, dtype="float32", compile="none",
        log_every=100, valid_every=250, checkpoint_every=500,
    )  # fmt: skip


def mri_unet() -> MriRecipe:
    """A U-Net on zero-filled images of the same measurements."""
    return dataclasses.replace(mri_monarch_sense(), name="mri_unet", model="unet", dtype="bfloat16")


def tiny_mri() -> MriRecipe:
    """SENSE with a learnable transform on small slices, for a CPU."""
    return dataclasses.replace(
        mri_monarch_sense(), name="tiny_mri", size=(48, 48), coils=4, acceleration=2, shots=40, valid_slices=8,
        test_slices=8, channels=4, steps=60, batch=8, log_every=20, valid_every=30, checkpoint_every=30,
    )  # fmt: skip
