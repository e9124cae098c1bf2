"""Lists that published recipes write as Python: read here without running code of a file.

Some of the published files hold ``!!python/object/apply:eval ["[int(x * 0.1 * 512) for x in range(5, 21)]"]``.
Detectron2 reads these by ``eval``. Here such a list is parsed, and can hold numbers, products, ``int`` and ``range``
alone.
"""

import ast

import yaml

__all__ = ["TAG", "construct_list"]

TAG = "tag:yaml.org,2002:python/object/apply:eval"
LONGEST = 1000  # items


def evaluate_list(text: str) -> list[int | float]:
    """The value of ``[... for x in range(...)]``, where ``...`` is made of numbers, ``x``, ``*`` and ``int()``.

    Raises:
        ValueError: if the text has any other form.
    """
    try:
        expression = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, RecursionError, MemoryError) as error:
        raise _refusal(text) from error
    match expression:
        case ast.ListComp(
            elt=element,
            generators=[
                ast.comprehension(
                    target=ast.Name(id=variable),
                    iter=ast.Call(func=ast.Name(id="range"), args=arguments, keywords=[]),
                    ifs=[],
                    is_async=0,
                )
            ],
        ):
            limits = [a.value for a in arguments if isinstance(a, ast.Constant) and type(a.value) is int]
            if limits and len(limits) == len(arguments) <= 2 and max(limits) - min(0, *limits) <= LONGEST:
                return [_value(element, variable, value, text) for value in range(*limits)]
    raise _refusal(text)


def _value(node: ast.expr, variable: str, value: int, text: str) -> int | float:
    match node:
        case ast.Constant(value=int() | float() as number):
            return number
        case ast.Name(id=name) if name == variable:
            return value
        case ast.BinOp(left=left, op=ast.Mult(), right=right):
            return _value(left, variable, value, text) * _value(right, variable, value, text)
        case ast.Call(func=ast.Name(id="int"), args=[argument], keywords=[]):
            try:
                return int(_value(argument, variable, value, text))
            except OverflowError as error:  # of 1e999, infinity
                raise _refusal(text) from error
    raise _refusal(text)


def _refusal(text: str) -> ValueError:
    return ValueError(
        f"it holds the Python code {text!r}, which is not run: write the value itself "
        "(read are lists such as [int(x * 0.1 * 512) for x in range(5, 21)])"
    )


def construct_list(loader: yaml.SafeLoader, node: yaml.Node) -> list[int | float]:
    """PyYAML's constructor for ``TAG``.

    Raises:
        ValueError: if the node is no such list.
    """
    if isinstance(node, yaml.SequenceNode) and len(node.value) == 1:
        return evaluate_list(str(loader.construct_object(node.value[0])))
    raise _refusal(str(node.value))
