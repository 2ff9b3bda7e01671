"""`from cascade import Recognizer`, loaded when it is asked for: importing a part of the package stays cheap."""


def __getattr__(name: str) -> object:
    if name == "Recognizer":
        from cascade.recognizer import Recognizer

        return Recognizer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
