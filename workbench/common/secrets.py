"""What of an address or a message may be shown: everything but what logs somebody in."""

import os
import re
from urllib.parse import unquote

_URLS = ("MLFLOW_TRACKING_URI", "WORKBENCH_STORAGE")


_SECRETS = ("MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN", "PGPASSWORD", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY")


_USER = re.compile(r"(?<=://)[^\s/'\"<>]*@")


_NAMED = re.compile(
    r"((?:password|passwd|pwd|\btoken|secret|api_?key)=|\b(?:Basic|Bearer) (?=[\w+/=.-]{12}))[^\s&'\",;)]+",
    re.IGNORECASE,
)


def hide_passwords(text: str) -> str:
    """A text as it may be shown or kept: a URL, or a message that speaks of one, without what logs somebody in.

    What is hidden: user and password of URLs, values of password=, token= and the like, and the secrets of this
    process's environment wherever they stand.
    """
    for secret in _secrets():
        text = text.replace(secret, "***")
    return _NAMED.sub(r"\1***", _USER.sub("***@", text))


def _secrets() -> set[str]:
    """Secrets in this process's environment, as they stand there and decoded.

    Without those of up to three letters and those that are also the user's name: to hide these would hide plain words.
    """
    found = {os.environ.get(name, "") for name in _SECRETS}
    for url in (os.environ.get(name, "") for name in _URLS):
        user, _, password = url.partition("://")[2].rpartition("@")[0].partition(":")
        found |= {password} - {user}
        found |= {value for _, value in re.findall(r"[?&](password|sslpassword|token)=([^&]+)", url)}
    return {secret for each in found for secret in (each, unquote(each)) if len(secret) > 3}
