"""What a backup or a restore ends with when it cannot be done. Each message is for the person who typed the command."""


class BackupFailed(Exception):  # noqa: N818 - an outcome, in our words
    """No backup was made; what was begun is no backup."""


class RestoreRefused(Exception):  # noqa: N818 - an outcome, in our words
    """Nothing was restored: the backup is damaged, or the database is not one to restore into. Nothing was changed."""


class BackupDamaged(RestoreRefused):
    """The backup is not what was written, or was never finished."""
