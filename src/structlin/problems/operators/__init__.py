"""Operators between functions, learned from solutions of differential equations that are computed here.

Navier-Stokes, Burgers and Darcy data as in Li et al. 2021 (Fourier neural operator), and the models FNO, Monarch-NO
(Dao et al. 2022: the same operator with learnable Monarch factors for its transforms) and a U-Net.
"""
