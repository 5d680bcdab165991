"""What can go wrong on the user's side. The command line prints these without a traceback and exits 2."""


class TrilobitError(Exception):
    """Base of every error that is the user's to mend. The message says what is wrong, where, and what to do next."""


class ConfigError(TrilobitError):
    """A setting, or a combination of settings, that cannot work. Names the flag."""


class ModelError(TrilobitError):
    """A model that is missing, damaged, or of a kind that is refused. Names the module or the file."""


class RolesError(ModelError):
    """A decoder whose linears cannot be told apart. Its layers' outputs can be watched all the same."""


class DataError(TrilobitError):
    """Text that is missing, unreadable, or too short."""


class OutputError(TrilobitError):
    """A place that cannot be written, or that would be overwritten."""


class NonFiniteError(TrilobitError):
    """Training stopped, before an update or a checkpoint, because something of the model's was not finite."""


LAST_UPDATE = "The last update broke the weights, and they were not saved. Try a lower --lr."
"""What has happened when a step's loss and gradient were finite and what follows it is not."""


class VerificationError(TrilobitError):
    """A written artefact, read back by its real consumer, does not agree with the model it was made from."""


class ExportError(TrilobitError):
    """A model that the target format or engine cannot hold. Says what can."""


class UnsupportedError(TrilobitError):
    """Something that no construction or kernel here reaches, such as a Hadamard matrix of this width. Says what does."""


class RankError(TrilobitError):
    """A run of several processes that lost one of them, or that another one stopped."""
