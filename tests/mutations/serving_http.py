"""Faults of the server over HTTP: texts that end wrongly, requests that nobody waits for, names that mean another."""

from mutations.mutation import Mutation

TEXT = "tests/serving/http/test_text.py::test_"
FAULTS = "tests/serving/http/test_faults.py::test_"
REFUSALS = "tests/serving/http/test_refusals.py::test_"
ANSWERS = "tests/serving/http/test_answers.py::test_"

MUTATIONS = (
    Mutation(
        "the beginning of a stop text is told before the text is known to go on",
        "jlora/serving/text.py",
        "        return max((_begun(self.whole, each) for each in self._stop), default=0)",
        "        return 0",
        (TEXT + "a_stop_text_is_found_across_tokens_and_characters_and_no_part_of_it_is_told",),
    ),
    Mutation(
        "bytes of no character take back the characters before them",
        "jlora/serving/text.py",
        "        if not text.startswith(self._known):",
        "        if False:",
        (TEXT + "bytes_of_no_character_lose_nothing_around_them",),
    ),
    Mutation(
        "requests of a client that is gone go on",
        "jlora/serving/http/app.py",
        "        finally:\n            self._answers.cancel()\n",
        "        finally:\n",
        (FAULTS + "a_client_that_vanishes_takes_its_requests_along",),
    ),
    Mutation(
        "requests before one that is refused go on",
        "jlora/serving/http/answers.py",
        "        except BaseException:\n            self.cancel()\n",
        "        except BaseException:\n",
        (FAULTS + "a_call_whose_second_request_is_refused_leaves_no_first",),
    ),
    Mutation(
        "a name that got another adapter in between is taken for the same",
        "jlora/serving/http/shelf.py",
        "self._entries.get(entry.name) is entry",
        "entry.name in self._entries",
        (FAULTS + "a_name_that_changes_between_the_tokens_of_a_call_and_its_submission_is_looked_up_anew",),
    ),
    Mutation(
        "adapters are loaded from anywhere",
        "jlora/serving/http/shelf.py",
        "folder.is_relative_to(root) and folder.is_dir()",
        "folder.is_dir()",
        (FAULTS + "a_call_loads_nothing_from_elsewhere", FAULTS + "a_link_leads_nowhere_else"),
    ),
    Mutation(
        "any token lets in",
        "jlora/serving/http/guard.py",
        'hmac.compare_digest(given.strip().encode("latin-1"), self._token.encode())',
        "given",
        (REFUSALS + "without_the_token_there_is_nothing_but_the_page_and_health",),
    ),
    Mutation(
        "fields that nobody knows are passed over",
        "jlora/serving/http/body.py",
        "        if self._fields:\n",
        "        if False:\n",
        (REFUSALS + "what_a_field_can_not_be_is_said_by_its_name",),
    ),
    Mutation(
        "answers of a call have the same seed",
        "jlora/serving/http/answers.py",
        "asked.seed + index",
        "asked.seed",
        (ANSWERS + "a_seed_gives_the_same_text_again_and_n_answers_have_seeds_that_follow",),
    ),
    Mutation(
        "templates of adapters are run unasked",
        "jlora/training/commands/serving.py",
        "return self._trusts or all(",
        "return True or all(",
        ("tests/serving/http/test_command.py::test_odd_names_templates_and_many_end_tokens_are_told_at_the_start",),
    ),
)
