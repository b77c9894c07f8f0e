"""Losses, optimizers, schedules, augmentation, mixing, weight averaging: one small frozen class
each.
"""
