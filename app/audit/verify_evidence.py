"""Checks an evidence bundle of Distributed Lookup, offline, with nothing but Python 3.9 or later: no package, no network.

    python -I -S verify_evidence.py BUNDLE --key KEY_ID

KEY_ID is the fingerprint of the key that heads are signed with, as you were told it by a way that you trust (not by the
bundle); an earlier key will do if the later ones were endorsed. Exit code 0: all that is shown holds. 1: something does not.
2: there is no bundle.

What is checked: each fact is what its hash says and follows the one before it; each is in the Merkle tree (RFC 9162) of a
head, at its position; each head is signed (Ed25519, RFC 8032) by a key that the one you named is or has endorsed; the result
documents are those that the facts tell of. What cannot be seen: whether a fact is true, and whether newer facts of the job were
left out.
"""

import base64
import hashlib
import json
import sys

KIND = "distributed-lookup evidence"
HEAD_SIGNED_AS = b"distributed-lookup log head v1\n"
KEY_SIGNED_AS = b"distributed-lookup head key v1\n"


class Broken(Exception):
    """What the bundle claims does not hold."""


# --- Ed25519: RFC 8032, section 5.1. Nothing here is secret, so nothing needs to take the same time. -----------------------

P = 2**255 - 19
ORDER = 2**252 + 27742317777372353535851937790883648493
D = -121665 * pow(121666, P - 2, P) % P
ROOT_OF_MINUS_1 = pow(2, (P - 1) // 4, P)


def ed25519_holds(public: bytes, signature: bytes, message: bytes) -> bool:
    """Whether the key signed the message."""
    if len(public) != 32 or len(signature) != 64:
        return False
    scalar = int.from_bytes(signature[32:], "little")
    key = _point(public)
    if key is None or scalar >= ORDER:
        return False
    challenge = int.from_bytes(hashlib.sha512(signature[:32] + public + message).digest(), "little") % ORDER
    minus_key = (P - key[0], key[1], key[2], P - key[3])
    return _encoded(_sum(_times(scalar, BASE), _times(challenge, minus_key))) == signature[:32]


def _x_of(y: int, sign: int):
    """The x of a point by its y (section 5.1.3); None if there is none."""
    if y >= P:
        return None
    square = (y * y - 1) * pow(D * y * y + 1, P - 2, P) % P
    x = pow(square, (P + 3) // 8, P)
    if (x * x - square) % P:
        x = x * ROOT_OF_MINUS_1 % P
    if (x * x - square) % P or (x == 0 and sign):
        return None
    return x if x & 1 == sign else P - x


def _point(encoded: bytes):
    number = int.from_bytes(encoded, "little")
    y, sign = number & (1 << 255) - 1, number >> 255
    x = _x_of(y, sign)
    return None if x is None else (x, y, 1, x * y % P)


def _encoded(point) -> bytes:
    x, y, z, _ = point
    inverse = pow(z, P - 2, P)
    x, y = x * inverse % P, y * inverse % P
    return int(y | (x & 1) << 255).to_bytes(32, "little")


def _sum(one, other):
    """In extended coordinates (section 5.1.4)."""
    a = (one[1] - one[0]) * (other[1] - other[0]) % P
    b = (one[1] + one[0]) * (other[1] + other[0]) % P
    c = 2 * one[3] * other[3] * D % P
    d = 2 * one[2] * other[2] % P
    e, f, g, h = b - a, d - c, d + c, b + a
    return e * f % P, g * h % P, f * g % P, e * h % P


def _times(scalar: int, point):
    result = (0, 1, 1, 0)
    while scalar:
        if scalar & 1:
            result = _sum(result, point)
        point = _sum(point, point)
        scalar >>= 1
    return result


_BASE_Y = 4 * pow(5, P - 2, P) % P
_BASE_X = _x_of(_BASE_Y, 0)
BASE = (_BASE_X, _BASE_Y, 1, _BASE_X * _BASE_Y % P)


# --- Keys and heads --------------------------------------------------------------------------------------------------------


def keys_of(bundle, trusted) -> dict[str, bytes]:
    """Public keys by their id: those that the trusted one is or has endorsed; all of them if none was named."""
    told = {key["key"]: bytes.fromhex(key["public"]) for key in bundle["keys"]}
    for key_id, public in told.items():
        if hashlib.sha256(public).hexdigest()[:32] != key_id:
            raise Broken(f"key {key_id} is not the one that it is called")
    if trusted is None:
        return told
    if trusted not in told:
        raise Broken(f"the key {trusted} that you trust is not among those of the bundle")
    keys = {trusted: told[trusted]}
    for key in bundle["keys"]:
        by, endorsement = key.get("endorsed_by"), key.get("endorsement", "")
        if by in keys and ed25519_holds(keys[by], bytes.fromhex(endorsement), KEY_SIGNED_AS + told[key["key"]]):
            keys[key["key"]] = told[key["key"]]
    return keys


def check_head(head, keys) -> None:
    number = head["number"]
    if head["key"] not in keys:
        raise Broken(f"head {number} is signed by key {head['key']}, which nobody whom you trust has endorsed")
    body = {name: value for name, value in head.items() if name != "signature"}
    signed = HEAD_SIGNED_AS + json.dumps(body, sort_keys=True, separators=(",", ":")).encode()
    if not ed25519_holds(keys[head["key"]], bytes.fromhex(head["signature"]), signed):
        raise Broken(f"head {number} is not signed by key {head['key']}")


# --- Facts -----------------------------------------------------------------------------------------------------------------


def check_facts(bundle) -> dict[int, bytes]:
    """The chain of the job's stream: gives the hash of each fact by its position."""
    stream_id = bytes.fromhex(bundle["job_id"].replace("-", ""))
    previous, position, hashes = bytes(32), 0, {}
    for number, fact in enumerate(bundle["facts"], start=1):
        if fact["version"] != number or fact["position"] <= position:
            raise Broken(f"position {fact['position']}: a fact before it is missing, or the order is another one")
        position = fact["position"]
        lines = fact["state"].encode().split(b"\n")
        if len(lines) not in (3, 5):
            raise Broken(f"position {position}: it is no fact")
        previous = _chained(previous, stream_id, number, fact["topic"], lines[0], lines[1])
        if previous.hex().encode() != lines[2]:
            raise Broken(f"position {position}: the fact is not what was recorded")
        if len(lines) == 5:
            _check_erasable(position, lines)
        hashes[position] = previous
    if not hashes:
        raise Broken("there are no facts")
    return hashes


def _chained(previous, stream_id, version, topic, envelope, chained) -> bytes:
    hasher = hashlib.sha256(previous + stream_id + version.to_bytes(8, "big"))
    for part in (topic.encode(), envelope, chained):
        hasher.update(len(part).to_bytes(8, "big") + part)
    return hasher.digest()


def _check_erasable(position, lines) -> None:
    """The chained envelope has the SHA-256 of salt and value of whatever may be erased."""
    digests = json.loads(lines[0]).get("erasable", {})
    salts, values = json.loads(lines[3]), json.loads(lines[4])
    for name, value in values.items():
        spelled = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
        if hashlib.sha256(bytes.fromhex(salts.get(name, "")) + spelled).hexdigest() != digests.get(name):
            raise Broken(f"position {position}: its {name} is not what was recorded")


def check_proof(fact, fact_hash, heads) -> None:
    """RFC 9162, section 2.1.3.2."""
    proof, position = fact["proof"], fact["position"]
    head = heads.get(proof["head"])
    if head is None:
        raise Broken(f"position {position}: head {proof['head']} is not in the bundle")
    index, last = proof["leaf_index"], head["facts"] - 1
    node = hashlib.sha256(b"\x00" + position.to_bytes(8, "big") + fact_hash).digest()
    holds = 0 <= index <= last
    for step in proof["path"]:
        other = bytes.fromhex(step)
        holds = holds and last > 0
        if index & 1 or index == last:
            node = hashlib.sha256(b"\x01" + other + node).digest()
            while index and not index & 1:
                index, last = index >> 1, last >> 1
        else:
            node = hashlib.sha256(b"\x01" + node + other).digest()
        index, last = index >> 1, last >> 1
    if not holds or last != 0 or node.hex() != head["root"] or position > head["position"]:
        raise Broken(f"position {position}: the fact is not in the tree of head {head['number']}")


def check_documents(bundle) -> tuple[int, int]:
    """Gives how many there are, and how many that a fact tells of are not in the bundle."""
    told = set()
    for fact in bundle["facts"]:
        chained = json.loads(fact["state"].split("\n")[1])
        told |= {chained[name]["sha256"] for name in ("result", "raw") if isinstance(chained.get(name), dict)}
    for digest, body in bundle["documents"].items():
        if digest not in told:
            raise Broken(f"no fact tells of document {digest}")
        if hashlib.sha256(base64.b64decode(body, validate=True)).hexdigest() != digest:
            raise Broken(f"document {digest} is not what was recorded")
    return len(bundle["documents"]), len(told - bundle["documents"].keys())


def check(bundle, trusted=None) -> list[str]:
    """What holds, in sentences. Raises `Broken`."""
    if bundle.get("kind") != KIND or bundle.get("v") != 1:
        raise Broken("this is no evidence bundle of a version that is known here")
    keys = keys_of(bundle, trusted)
    heads = {head["number"]: head for head in bundle["heads"]}
    for head in heads.values():
        check_head(head, keys)
    hashes = check_facts(bundle)
    shown = [fact for fact in bundle["facts"] if fact["proof"] is not None]
    for fact in shown:
        check_proof(fact, hashes[fact["position"]], heads)
    documents, missing = check_documents(bundle)
    sentences = [
        f"Job {bundle['job_id']}: {len(hashes)} facts, each what was recorded, in the order of its stream.",
        f"{len(shown)} of them are in the log under signed heads.",
        f"{documents} result documents are what was recorded; {missing} that facts tell of are not in the bundle.",
    ]
    sentences += [
        f"Head {head['number']} of {head['at']}: {head['facts']} facts up to position {head['position']}, by key {head['key']}."
        for head in heads.values()
    ]
    uncovered = [str(fact["position"]) for fact in bundle["facts"] if fact["proof"] is None]
    if uncovered:
        sentences.append(
            "NOT SHOWN to be in the signed log (no head covered them yet): positions " + ", ".join(uncovered) + "."
        )
    if trusted is None:
        sentences.append(
            "NO KEY WAS NAMED: whoever made this bundle may have made its keys. Compare their ids with what you know."
        )
    return sentences


def main(words) -> int:
    trusted = None
    if "--key" in words:
        at = words.index("--key")
        trusted = words[at + 1] if at + 1 < len(words) else ""
        words = words[:at] + words[at + 2 :]
    if len(words) != 1:
        print("Usage: python verify_evidence.py BUNDLE [--key KEY_ID]", file=sys.stderr)
        return 2
    try:
        with open(words[0], encoding="utf-8") as file:
            bundle = json.load(file)
    except (OSError, ValueError) as error:
        print(f"{words[0]} cannot be read as JSON ({type(error).__name__}).", file=sys.stderr)
        return 2
    try:
        sentences = check(bundle, trusted)
    except Broken as broken:
        print(f"BROKEN: {broken}.")
        return 1
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError) as error:
        print(f"BROKEN: the bundle is not made as it should be ({type(error).__name__}).")
        return 1
    print("\n".join(sentences))
    print("HOLDS." if trusted is not None else "HOLDS, if the keys are genuine.")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
