"""Many FTP sessions at once from one thread: mixed commands, aborted transfers, resets, and all bytes compared."""

from __future__ import annotations

import asyncio
import contextlib
import random
import re
import socket
import struct


class Broken(Exception):
    """The server said something that it should not."""


class Session:
    """A client that knows what the server must answer."""

    def __init__(self, address: tuple[str, int], name: str, seed: int) -> None:
        self._address = address
        self._name = name
        self._random = random.Random(seed)
        self._files: dict[str, bytes] = {}

    async def run(self, rounds: int) -> None:
        self._reader, self._writer = await asyncio.open_connection(*self._address)
        try:
            await self._expect("220")
            await self._command("USER anonymous", "331")
            await self._command("PASS x", "230")
            await self._command("TYPE I", "200")
            await self._command(f"MKD {self._name}", "257")
            for _ in range(rounds):
                action = self._random.choice(
                    [self._store, self._retrieve, self._list, self._size, self._abort, self._reset, self._delete]
                )
                await action()
            if self._random.random() < 0.5:
                await self._command("QUIT", "221")
        finally:
            self._writer.close()
            with contextlib.suppress(OSError):
                await self._writer.wait_closed()

    async def _expect(self, *codes: str) -> str:
        while True:
            line = (await self._reader.readline()).decode()
            if not line or line[3:4] == " ":
                break
        if line[:3] not in codes:
            raise Broken(f"{self._name}: {line!r} instead of {' or '.join(codes)}")
        return line

    async def _command(self, command: str, *codes: str) -> str:
        self._writer.write(f"{command}\r\n".encode())
        return await self._expect(*codes)

    async def _data(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        match = re.search(r"\|(\d+)\|", await self._command("EPSV", "229"))
        assert match is not None
        return await asyncio.open_connection(self._address[0], int(match[1]))

    def _path(self) -> str:
        return f"{self._name}/{self._random.randrange(5)}"

    async def _store(self) -> None:
        path, data = self._path(), self._random.randbytes(self._random.choice([0, 1, 5000, 300_000]))
        _, writer = await self._data()
        await self._command(f"STOR {path}", "125", "150")
        writer.write(data)
        writer.close()
        await self._expect("226")
        self._files[path] = data

    async def _retrieve(self) -> None:
        path = self._path()
        reader, writer = await self._data()
        if path not in self._files:
            await self._command(f"RETR {path}", "550")
        else:
            await self._command(f"RETR {path}", "125", "150")
            if await reader.read(-1) != self._files[path]:
                raise Broken(f"{path} came with other bytes")
            await self._expect("226")
        writer.close()

    async def _list(self) -> None:
        reader, writer = await self._data()
        await self._command(f"NLST {self._name}", "125", "150")
        found = set((await reader.read(-1)).decode().split())
        await self._expect("226")
        writer.close()
        expected = set(self._files)  # names as they can be used: the folder is among them
        if found != expected:
            raise Broken(f"{self._name} has {found}, not {expected}")

    async def _size(self) -> None:
        path = self._path()
        if path in self._files:
            answer = await self._command(f"SIZE {path}", "213")
            if int(answer[4:]) != len(self._files[path]):
                raise Broken(f"{path}: {answer}")
        else:
            await self._command(f"SIZE {path}", "550")

    async def _delete(self) -> None:
        path = self._path()
        await self._command(f"DELE {path}", "250" if path in self._files else "550")
        self._files.pop(path, None)

    async def _abort(self) -> None:
        _, writer = await self._data()
        await self._command(f"STOR {self._path()}", "125", "150")
        writer.write(self._random.randbytes(self._random.choice([1, 100_000])))
        await writer.drain()
        await self._command("ABOR", "426")
        await self._expect("226")
        writer.close()

    async def _reset(self) -> None:
        _, writer = await self._data()
        await self._command(f"STOR {self._path()}", "125", "150")
        writer.write(b"x" * self._random.choice([1, 100_000]))
        line_cut = struct.pack("ii", 1, 0)
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, line_cut)
        writer.transport.abort()
        await self._expect("426", "425")


def hammer(address: tuple[str, int], *, sessions: int, seed: int, rounds: int = 10) -> list[str]:
    """Run so many sessions at once; return what went wrong."""

    async def all_of_them() -> list[str]:
        clients = [Session(address, f"session-{number}", seed * 1000 + number) for number in range(sessions)]
        outcomes = await asyncio.gather(*(client.run(rounds) for client in clients), return_exceptions=True)
        return [f"{type(outcome).__name__}: {outcome}" for outcome in outcomes if outcome is not None]

    return asyncio.run(all_of_them())
