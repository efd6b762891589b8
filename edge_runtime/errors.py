"""What can go wrong, as exit codes that scripts may rely on.

Every error is one line for a person: what is wrong, and what to do about it.

| code | class | meaning |
|---|---|---|
| 0 | | success |
| 1 | | a bug, with a traceback; a process of `demo`, `bench` or the gate failed; a reader left |
| 2 | | wrong usage of the command line |
| 10 | BundleError | bundle missing, truncated, altered or of another format |
| 11 | AdapterError | adapters or state do not fit the bundle, or state is damaged or not there |
| 12 | DataError | training text missing, unreadable or too short |
| 13 | BudgetError | no plan fits the memory budget |
| 14 | UnreachableError | the coordinator could not be reached, or kept failing |
| 15 | TrustError | a certificate, or an invitation, is not accepted by the other side |
| 16 | AddressError | the port cannot be listened on |
| 17 | StorageError | the disk is full or fails, or what is to be written exists or is in use |
| 18 | BaseModelError | the base model is not available or not supported |
| 19 | ParityError | a compiled program disagrees with PyTorch, or ignores its adapters |
| 20 | MissingPartError | a needed package is not installed |
| 21 | RefusedError | the coordinator refused an update or a request |
| 22 | AuditError | the audit log was altered or is damaged |
| 23 | VersionError | versions of device, coordinator or its state do not understand each other |
| 24 | BackupError | a backup is damaged, or of another version |
| 25 | DivergedError | training went beyond what float32 holds |
| 130 | | interrupted |
"""


class ComigsError(Exception):
    """An error that the user can act on; `code` is the process's exit code."""

    code = 1


class BundleError(ComigsError):
    code = 10


class AdapterError(ComigsError):
    code = 11


class DataError(ComigsError):
    code = 12


class BudgetError(ComigsError):
    code = 13


class UnreachableError(ComigsError):
    code = 14


class TrustError(ComigsError):
    code = 15


class AddressError(ComigsError):
    code = 16


class StorageError(ComigsError):
    code = 17


class BaseModelError(ComigsError):
    code = 18


class ParityError(ComigsError):
    code = 19


class MissingPartError(ComigsError):
    code = 20


class RefusedError(ComigsError):
    code = 21


class AuditError(ComigsError):
    code = 22


class VersionError(ComigsError):
    code = 23


class BackupError(ComigsError):
    code = 24


class DivergedError(ComigsError):
    code = 25


def brief(text: str, most: int = 300) -> str:
    """`text`, in which something is that others wrote, as one printable line of that length."""
    if len(text) > most:
        text = f"{text[: most // 2]}...{text[3 - most // 2 :]}"
    return "".join(letter if letter.isprintable() else "\ufffd" for letter in text)
