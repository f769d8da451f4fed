import pytest

from workbench.common.secrets import hide_passwords


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("postgresql://me:s3cret@host:5432/db", "postgresql://***@host:5432/db"),
        ("cannot open 'http://me:s3cret@host/' (refused)", "cannot open 'http://***@host/' (refused)"),
        ("postgresql://host/db?user=me&password=s3cret&x=1", "postgresql://host/db?user=me&password=***&x=1"),
        ("connection failed: host=h password=s3cret port=1", "connection failed: host=h password=*** port=1"),
        ("https://host/api?token=s3cret", "https://host/api?token=***"),
        (
            "header Authorization: Basic bWU6c2VjcmV0, no basic training",
            "header Authorization: Basic ***, no basic training",
        ),
        ("two: a://u:s3cret@h b://u:s3cret@h", "two: a://***@h b://***@h"),
        ("hf://datasets/name@revision, sqlite:////tmp/a@b.db", "hf://datasets/name@revision, sqlite:////tmp/a@b.db"),
        ("77 tokens, max_tokens=77", "77 tokens, max_tokens=77"),
    ],
)
def test_what_logs_somebody_in_is_hidden(text, shown):
    assert hide_passwords(text) == shown


def test_secrets_of_the_environment_are_hidden_wherever_they_stand(monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "postgresql://me:p%40ss/word@host/db")
    monkeypatch.setenv("WORKBENCH_STORAGE", "postgresql://host/db?user=me&password=another")
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "bearer-of-news")
    text = "invalid port 'p%40ss/word', FATAL: p@ss/word, 'another', header bearer-of-news"
    assert hide_passwords(text) == "invalid port '***', FATAL: ***, '***', header ***"


def test_a_password_that_is_the_users_name_hides_no_plain_words(monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "postgresql://mlflow:mlflow@host/mlflow")
    assert hide_passwords("the mlflow server at postgresql://mlflow:mlflow@host/mlflow") == (
        "the mlflow server at postgresql://***@host/mlflow"
    )
