"""The dsv4 binary as a user runs it: results on stdout, exit codes, bad input, Ctrl-C. Needs only the bundled model.

Usage: cli_test.py PATH_TO_DSV4 SOURCE_DIR
"""
import json
import os
import pathlib
import pty
import re
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import unittest

DSV4, SOURCE = sys.argv[1], pathlib.Path(sys.argv[2])
DEMO = str(SOURCE / "models/demo")


def run(*args, stdin=None, timeout=120):
    return subprocess.run([DSV4, *args], input=stdin, capture_output=True, text=True, timeout=timeout)


def write_safetensors(path, tensors):
    header, data = {}, b""
    for name, (dtype, shape, content) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(content)]}
        data += content
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def read_safetensors(path):
    raw = path.read_bytes()
    size = struct.unpack_from("<Q", raw)[0]
    header = json.loads(raw[8 : 8 + size])
    header.pop("__metadata__", None)
    return {n: (t["dtype"], t["shape"], raw[8 + size + t["data_offsets"][0] : 8 + size + t["data_offsets"][1]]) for n, t in header.items()}


class Terminal:
    """A command whose stderr is a terminal, which is what draws progress."""

    def __init__(self, *args):
        self.master, slave = pty.openpty()
        self.process = subprocess.Popen([DSV4, *args], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=slave)
        os.close(slave)
        self.shown = ""

    def read(self):  # False at the end
        try:
            piece = os.read(self.master, 65536)
        except OSError:
            piece = b""
        self.shown += piece.decode()
        return bool(piece)

    def wait_for(self, pattern):
        while not re.search(pattern, self.shown):
            if not self.read():
                raise AssertionError(f"{pattern} never shown: {self.shown}")

    def finish(self):
        while self.read():
            pass
        os.close(self.master)
        self.process.communicate(timeout=60)
        return self.process.returncode


class TempFolder(unittest.TestCase):
    def setUp(self):
        self.folder = pathlib.Path(tempfile.mkdtemp(prefix="dsv4_cli_"))
        self.addCleanup(shutil.rmtree, self.folder)

    def broken_demo(self):
        copy = self.folder / "demo"
        shutil.copytree(DEMO, copy)
        return copy


class Usage(unittest.TestCase):
    def test_help_goes_to_stdout_and_names_every_command(self):
        result = run("--help")
        self.assertEqual(result.returncode, 0)
        for command in ("inspect", "quantize", "generate", "chat", "eval", "bench", "doctor", "synth"):
            self.assertIn(command, result.stdout)
            self.assertEqual(run(command, "--help").returncode, 0, command)

    def test_one_version_everywhere(self):
        version = run("--version").stdout.split()[1]
        self.assertRegex(version, r"^\d+\.\d+\.\d+$")
        header = (SOURCE / "include/dsv4/version.h").read_text()
        self.assertEqual(".".join(re.findall(r"#define DSV4_VERSION_\w+ (\d+)", header)), version)
        for name, pattern in (("CMakeLists.txt", r"project\(dsv4 VERSION (\S+)"), ("pyproject.toml", r'(?m)^version = "(.*)"'),
                              ("python/dsv4/__init__.py", r'__version__ = "(.*)"')):
            self.assertEqual(re.search(pattern, (SOURCE / name).read_text()).group(1), version, name)

    def test_bench_names_its_benchmarks(self):
        result = run("bench", "nonsense")
        self.assertEqual(result.returncode, 2)
        for name in ("nonsense", "all", "model", "gemm", "moe"):
            self.assertIn(name, result.stderr)

    def test_doctor_names_what_runs(self):
        report = json.loads(run("doctor", "--json").stdout)
        self.assertIn("avx512_fp16", report["cpu"]["features"])
        choices = [op["choice"] for op in report["ops"]]
        self.assertEqual(choices[0], report["cpu"]["isa"])

    def test_wrong_usage_is_exit_2(self):
        for args in ([], ["nonsense"], ["generate", "-m", DEMO], ["generate", "-p", "x"], ["generate", "-m", DEMO, "-p", "x", "--kv", "fp7"],
                     ["generate", "-m", DEMO, "-p", "x", "--exact", "--kv", "fp8"], ["generate", "-m", DEMO, "-p", "x", "-n", "0"]):
            result = run(*args)
            self.assertEqual(result.returncode, 2, args)
            self.assertEqual(result.stdout, "", args)


class Generate(TempFolder):
    def test_same_seed_same_text_and_json_agrees(self):
        args = ("generate", "-m", DEMO, "-p", "It was late", "-n", "24", "--seed", "7")
        first, again = run(*args), run(*args)
        self.assertEqual(first.returncode, 0, first.stderr)
        self.assertEqual(first.stdout, again.stdout)
        self.assertIn("tokens/s", first.stderr)
        result = json.loads(run(*args, "--json", "-q").stdout)
        self.assertEqual(result["text"] + "\n", first.stdout)
        self.assertEqual(len(result["ids"]), 24)
        self.assertEqual(result["prompt_ids"][0], 0)
        self.assertGreater(result["bytes_read_per_token"], 1e6)
        self.assertNotEqual(run(*args[:-1], "8").stdout, first.stdout)

    def test_prompt_from_stdin_file_and_tokens_are_the_same_prompt(self):
        args = ("generate", "-m", DEMO, "--exact", "--temp", "0", "-n", "8", "--json", "-q")
        prompt_file, ids_file = self.folder / "prompt.txt", self.folder / "ids.safetensors"
        prompt_file.write_text("The moor was")
        expected = json.loads(run(*args, "-p", "The moor was").stdout)
        ids = expected["prompt_ids"]
        write_safetensors(ids_file, {"input_ids": ("I64", [len(ids)], struct.pack(f"<{len(ids)}q", *ids))})
        for source in (["-p", "-"], ["-f", str(prompt_file)], ["--tokens-in", str(ids_file)]):
            self.assertEqual(json.loads(run(*args, *source, stdin="The moor was").stdout)["ids"], expected["ids"], source)

    def test_stop_string_is_not_part_of_the_text(self):
        args = ("generate", "-m", DEMO, "-p", "It was late", "-n", "60", "--temp", "0", "--json", "-q")
        free = json.loads(run(*args).stdout)["text"]
        stop = free[len(free) // 2 : len(free) // 2 + 3]
        result = json.loads(run(*args, "--stop", stop).stdout)
        self.assertEqual(result["text"], free[: free.index(stop)])
        self.assertEqual(result["finish_reason"], "stop")

    def test_every_precision_setting_runs(self):
        for setting in (["--exact"], ["--act", "a4"], ["--kv", "fp8", "--index", "fp4"], ["--kv", "nvfp4", "--index", "fp8"], ["--isa", "reference"],
                        ["--repack", "off"], ["--threads", "1", "--chunk", "3"]):
            result = run("generate", "-m", DEMO, "-p", "He turned to", "-n", "4", *setting)
            self.assertEqual(result.returncode, 0, (setting, result.stderr))

    def test_quiet_draws_nothing(self):
        args = ("generate", "-m", DEMO, "-p", "It was late", "-n", "2", "--repack", "on")
        loud = Terminal(*args)
        self.assertEqual(loud.finish(), 0, loud.shown)
        self.assertIn("repacking", loud.shown)
        quiet = Terminal(*args, "-q")
        self.assertEqual(quiet.finish(), 0, quiet.shown)
        self.assertEqual(quiet.shown, "")

    def test_interrupt_keeps_what_is_there(self):
        process = subprocess.Popen([DSV4, "generate", "-m", DEMO, "-p", "It was late", "-n", "100000"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        first = process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        rest, errors = process.communicate(timeout=60)
        self.assertEqual(process.returncode, 130)
        self.assertTrue(first + rest)
        self.assertIn("tokens/s", errors)


class Chat(TempFolder):
    def test_turns_commands_and_reset(self):
        script = "Good morning.\n/stats\n/think on\nWho is there?\n/reset\n/help\n/quit\nnever read\n"
        result = run("chat", "-m", DEMO, "-n", "12", "--temp", "0", stdin=script)
        self.assertEqual(result.returncode, 0, result.stderr)
        self.assertEqual(len(result.stdout.rstrip("\n").split("\n")) >= 2, True)
        self.assertIn("tokens/s", result.stderr)
        self.assertIn("/reset", result.stderr)

    def test_statistics_count_the_whole_prefill(self):
        result = run("chat", "-m", DEMO, "-n", "4", "--temp", "0", stdin="Good morning, Mr. Holmes.\n/stats\n")
        self.assertGreater(int(re.search(r"prefill (\d+) tokens", result.stderr).group(1)), 5, result.stderr)

    def test_interrupt_stops_a_prefill_between_chunks(self):
        chat = Terminal("chat", "-m", DEMO, "-n", "4", "--chunk", "16")
        chat.process.stdin.write(b"the moor " * 20000 + b"\n/stats\n")
        chat.process.stdin.close()
        chat.process.stdin = None
        chat.wait_for(r"prefill [1-9]\d* / \d+")
        chat.process.send_signal(signal.SIGINT)
        self.assertEqual(chat.finish(), 0)
        done = int(re.search(r"prefill (\d+) tokens", chat.shown).group(1))
        total = int(re.search(r"prefill \d+ / (\d+)", chat.shown).group(1))
        self.assertTrue(16 <= done < total, chat.shown[-300:])
        self.assertIn("decode 0 tokens", chat.shown)

    def test_reset_forgets(self):
        once = run("chat", "-m", DEMO, "-n", "10", "--temp", "0", stdin="Good morning.\n").stdout
        twice = run("chat", "-m", DEMO, "-n", "10", "--temp", "0", stdin="Good morning.\n/reset\nGood morning.\n").stdout
        self.assertEqual(twice, once + once)


class Eval(TempFolder):
    def test_logits_match_the_golden_cut_and_layers_have_their_shape(self):
        golden = read_safetensors(SOURCE / "tests/golden/model/demo_nvfp4.safetensors")
        tokens, out = self.folder / "in.safetensors", self.folder / "out.safetensors"
        write_safetensors(tokens, {"input_ids": golden["input_ids"]})
        result = run("eval", "logits", "-m", DEMO, "--exact", "--tokens", str(tokens), "--out", str(out), "--layers", "--margins")
        self.assertEqual(result.returncode, 0, result.stderr)
        made = read_safetensors(out)
        count = golden["input_ids"][1][0]
        self.assertEqual(made["logits"][:2], ("F32", [count, 4096]))
        self.assertEqual(made["layer_streams"][:2], ("F32", [6, count, 4, 256]))
        self.assertEqual(made["decision_margin"][:2], ("F32", [count]))
        expected = golden["logits_last16"][2]
        actual = made["logits"][2][-len(expected) :]
        worst = max(abs(a - b) for a, b in zip(struct.unpack(f"<{len(expected) // 4}f", expected), struct.unpack(f"<{len(expected) // 4}f", actual)))
        self.assertLessEqual(worst, 1e-3)

    def test_perplexity_counts_windows_as_documented(self):
        text = self.folder / "text.txt"
        text.write_text("It was a dark and stormy night, and Mr. Holmes sat by the fire. " * 12)
        result = run("eval", "ppl", "-m", DEMO, "--exact", "--text", str(text), "--ctx", "64", "--json", "-q")
        self.assertEqual(result.returncode, 0, result.stderr)
        report = json.loads(result.stdout)
        self.assertEqual(report["tokens"], 64 * report["windows"])
        self.assertGreater(report["windows"], 1)
        self.assertTrue(1 < report["perplexity"] < 1000)
        shorter = run("eval", "ppl", "-m", DEMO, "--text", str(text), "--ctx", "4096", "-q")
        self.assertEqual(shorter.returncode, 1)
        self.assertIn(str(text), shorter.stderr)
        limited = json.loads(run("eval", "ppl", "-m", DEMO, "--exact", "--text", str(text), "--ctx", "64", "--windows", "1", "--json", "-q").stdout)
        self.assertEqual(limited["windows"], 1)


class BadInput(TempFolder):
    def assert_refused(self, args, *words, code=1):
        result = run(*args)
        self.assertEqual(result.returncode, code, result.stderr)
        self.assertEqual(result.stdout, "")
        for word in words:
            self.assertIn(word, result.stderr)

    def test_missing_and_broken_folders(self):
        self.assert_refused(["generate", "-m", str(self.folder / "none"), "-p", "x"], "none")
        demo = self.broken_demo()
        weights = demo / "model.safetensors"
        content = weights.read_bytes()
        weights.write_bytes(content[: len(content) // 2])
        self.assert_refused(["generate", "-m", str(demo), "-p", "x"], "model.safetensors")
        weights.write_bytes(struct.pack("<Q", 2**63) + content[8:])
        self.assert_refused(["generate", "-m", str(demo), "-p", "x"], "model.safetensors")

    def test_a_scale_that_is_no_number_is_named_with_its_file(self):
        demo = self.broken_demo()
        weights = demo / "model.safetensors"
        content = bytearray(weights.read_bytes())
        size = struct.unpack_from("<Q", content)[0]
        header = json.loads(content[8 : 8 + size])
        name = next(n for n, t in header.items() if n.endswith(".w2.weight_scale"))
        content[8 + size + header[name]["data_offsets"][0]] = 0x7F
        weights.write_bytes(content)
        self.assert_refused(["generate", "-m", str(demo), "-p", "x"], str(weights), name.removesuffix(".weight_scale"), "0x7f")
        report = run("inspect", str(demo))
        self.assertEqual(report.returncode, 1)
        self.assertEqual(report.stdout.count(str(weights)), 1, report.stdout)
        self.assert_refused(["quantize", str(demo), str(self.folder / "out"), "--dense", "fp8", "-q"], str(weights), "second time")

    def test_no_permission_is_exit_3_everywhere(self):
        locked = self.folder / "locked"
        (locked / "demo").mkdir(parents=True)
        locked.chmod(0)
        self.addCleanup(locked.chmod, 0o700)
        self.folder.chmod(0o777)
        user = {"user": 65534, "group": 65534, "extra_groups": []} if os.geteuid() == 0 else {}
        try:
            subprocess.run([DSV4, "inspect", DEMO], capture_output=True, check=True, **user)
        except (PermissionError, subprocess.CalledProcessError):
            self.skipTest("another user cannot run the binary or read the demo here")
        inside = str(locked / "demo")
        for args in (["inspect", inside], ["generate", "-m", inside, "-p", "x"], ["quantize", inside, str(self.folder / "out")],
                     ["quantize", DEMO, inside + "/out"], ["eval", "ppl", "-m", DEMO, "--text", inside + "/text"],
                     ["synth", inside + "/out", "--shape", "demo"]):
            result = subprocess.run([DSV4, *args], capture_output=True, text=True, timeout=120, **user)
            self.assertEqual(result.returncode, 3, (args, result.stderr))
            self.assertIn(inside, result.stderr)
            self.assertIn("Permission denied", result.stderr)

    def test_weights_truncated_while_in_use(self):
        demo = self.broken_demo()
        process = subprocess.Popen([DSV4, "generate", "-m", str(demo), "-p", "It was late", "-n", "100000"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        process.stdout.read(1)
        os.truncate(demo / "model.safetensors", 4096)
        _, errors = process.communicate(timeout=60)
        self.assertEqual(process.returncode, 1)
        self.assertIn("mapped file", errors)

    def test_wrong_vocabulary_size(self):
        demo = self.broken_demo()
        config = json.loads((demo / "config.json").read_text())
        config["vocab_size"] = 4095
        (demo / "config.json").write_text(json.dumps(config))
        self.assert_refused(["generate", "-m", str(demo), "-p", "x"], "embed", "4095")

    def test_tokenizer_with_more_ids_than_the_model(self):
        demo = self.broken_demo()
        tokenizer = json.loads((demo / "tokenizer.json").read_text())
        tokenizer["added_tokens"].append(dict(tokenizer["added_tokens"][0], id=4096, content="<extra>"))
        (demo / "tokenizer.json").write_text(json.dumps(tokenizer))
        self.assert_refused(["generate", "-m", str(demo), "-p", "x"], "tokenizer.json", "4097", "4096")

    def test_token_ids_outside_the_vocabulary(self):
        ids = self.folder / "ids.txt"
        ids.write_text("0 5 4096")
        self.assert_refused(["generate", "-m", DEMO, "--tokens-in", str(ids)], "4096", "4095")
        ids.write_text("0 five")
        self.assert_refused(["generate", "-m", DEMO, "--tokens-in", str(ids)], "ids.txt", "five")

    def test_cuda_backend_is_a_missing_resource(self):
        self.assert_refused(["generate", "-m", DEMO, "-p", "x", "--backend", "cuda"], "cuda", code=3)

    def test_interrupted_logits_leave_no_file(self):
        tokens, out = self.folder / "in.safetensors", self.folder / "out.safetensors"
        count = 20000
        write_safetensors(tokens, {"input_ids": ("I64", [count], struct.pack(f"<{count}q", *([5] * count)))})
        process = subprocess.Popen([DSV4, "eval", "logits", "-m", DEMO, "--tokens", str(tokens), "--out", str(out)], stderr=subprocess.PIPE)
        time.sleep(1.0)
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
        self.assertEqual(process.returncode, 130)
        self.assertFalse(os.path.exists(out))


if __name__ == "__main__":
    unittest.main(argv=sys.argv[:1], verbosity=2)
