"""placeholder"""
import re


def is_master(text):
    return bool(re.fullmatch(r"local(\[.+\])?|yarn|(spark|k8s|mesos)://.+", text))
