# SPDX-License-Identifier: LGPL-2.1-or-later
"""Errors of work that is done again and again: each message is told once."""


class Complaints:
    """The latest error of each subject, such as a network's uuid."""

    def __init__(self) -> None:
        self._latest: dict[str, str] = {}

    def is_news(self, subject: str, error: Exception) -> bool:
        """Note an error; true if it differs from the subject's latest error."""
        message = f"{type(error).__name__}: {error}"
        news = self._latest.get(subject) != message
        self._latest[subject] = message
        return news

    def end(self, subject: str) -> None:
        """Note that the subject is well: the same error is news again."""
        self._latest.pop(subject, None)
