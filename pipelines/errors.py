"""How a run can end without its result, beside a user's mistake."""


class RunError(RuntimeError):
    """A step failed; the text says which, why, and what to do."""


class Stopped(BaseException):
    """SIGTERM or Ctrl-C: the step at work was stopped, and what is done stays."""
