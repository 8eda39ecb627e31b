"""What can go wrong on the user's side. Each message names the file or the field, the value, and the mend."""


class RatlipError(Exception):
    """Base of every error that a user can mend; the command line prints it without a traceback."""


class SettingsError(RatlipError):
    """A profile or an override has an unknown key, a wrong type or an impossible combination."""


class DataError(RatlipError):
    """A dataset root or a prepared folder is incomplete or damaged."""


class WeightsError(RatlipError):
    """CLIP, Inception or checkpoint weights are missing, damaged, or of another network."""


class RunError(RatlipError):
    """A run folder is missing, belongs to other settings, or is not as far as was asked for."""


class Stopped(SystemExit):
    """A signal ended the work at a step, which was saved; the exit status is 128 and the signal's number, as usual."""

    def __init__(self, number: int, message: str):
        super().__init__(128 + number)
        self.message = message


class BusyError(RunError):
    """Another process writes into the run folder: nothing is wrong, and the same command works later."""
