"""The names that tests leave to the solution, and the nodes of trees and linked lists: pure functions, without a sandbox."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trl_prime.sandbox.inside.prelude import (
    BUILTINS,
    NODES,
    PRELUDE,
    STANDARD,
    Ambiguous,
    ListNode,
    TreeNode,
    copy_node,
    find_node,
    make_nodes,
    node_kind,
    values_of,
)
from trl_prime.sandbox.inside.prelude import tested_names as names_of


@pytest.mark.parametrize(
    ("asserts", "names"),
    [
        (["assert f(2) == 4"], {"f"}),
        (["assert f(2) == g(4)"], {"f", "g"}),
        (["assert list(map(f, [1])) == [1]"], {"f"}),
        (["assert Solution().f(2) == 4"], {"Solution"}),
        (["xs = [1]; fill(xs); assert xs == [1]"], {"fill"}),
        (["assert (lambda f: f(1))(g) == 2"], {"g"}),
        (["assert [f(x) for x in range(3)] == list(range(3))"], {"f"}),
        (["def own(x):\n    return f(x)", "assert own(2) == 4"], {"f"}),
        (["import numpy as n", "assert n.allclose(f(2), 4)"], {"f"}),
        (["try:\n    f(1)\nexcept ValueError as e:\n    assert str(e) == ''"], {"f"}),
        # Python's own names and the tools of tests are theirs
        (["assert len(f(2)) == 4 and math.isclose(g(1), 1)"], {"f", "g"}),
        (["assert np.allclose(f(2), 4)"], {"f"}),
        (["assert Counter(f(2)) == Counter([1])"], {"f"}),
        (["assert __name__ == '__main__' or __file__ or __builtins__ or f(1)"], {"f"}),
        (["root = TreeNode(1); assert depth(root) == 1"], {"depth"}),
        # Those of the standard library's are, where they are applied to what is under test
        (["assert isclose(area(2), 12.6)"], {"area"}),
        (["assert prod(map(digit, [1])) == 1"], {"digit"}),
        (["assert add(1, 2) == 3 and double(2) == 4"], {"add", "double"}),
        (["assert add(1, 2) == 3"], {"add"}),
        # One that is named like a tool or a builtin is under test where nothing else can be
        (["assert sum(10, 15) == 6"], {"sum"}),
        (["assert sum(list([1, 2])) == 3", "assert sum(range(3)) == 3"], {"sum"}),
        (["assert abs(max(1.0, 2.0) - 2) < 1e-6"], {"max"}),
        (["assert Counter(permutations([1, 2])) == Counter([(1, 2), (2, 1)])"], {"permutations"}),
        (["assert sorted(permutations('ab')) == sorted(['ab', 'ba'])"], {"permutations"}),
        (["assert [gcd(a, b) for a, b in [(4, 6)]] == [2]"], {"gcd"}),
        (["assert set(range(1)) == {0}"], {"range"}),
    ],
)
def test_names_that_tests_leave_to_the_solution(asserts, names):
    assert names_of("", asserts) == names


@pytest.mark.parametrize("asserts", [["assert True"], ["assert max(1, 2) == min(2, 3)"], ["x = 1", "assert x == 1"]])
def test_tests_that_do_not_say_what_is_tested(asserts):
    with pytest.raises(Ambiguous):
        names_of("", asserts)


def test_an_entry_point_is_under_test_whatever_its_name():
    setup = "def helper(x):\n    return isclose(x, needed(x))"
    assert names_of(setup, ["assert max(1, min(2, 3)) == 2"], "max") == {"max", "needed"}
    assert names_of(setup, ["assert helper(f(2))"], "f") == {"f", "needed"}
    assert names_of("", ["check(Solution().solve)"], "Solution().solve") >= {"Solution"}
    with pytest.raises(SyntaxError):
        names_of("", ["assert f("], "f")


def test_the_prelude_replaces_no_builtin():
    assert not BUILTINS & STANDARD.keys()
    assert {"pairwise", "ascii_lowercase", "inf", "SupportsInt", "merge", "TreeNode", "math", "add"} <= PRELUDE.keys()
    assert "pow" not in PRELUDE


trees = st.recursive(st.none(), lambda child: st.builds(TreeNode, st.integers(), child, child), max_leaves=20)


def as_tuples(node):
    return node and (node.val, as_tuples(node.left), as_tuples(node.right))


@given(trees)
def test_trees_come_back_from_their_values(tree):
    values = values_of(tree, "TreeNode")
    assert not values or values[-1] is not None
    assert as_tuples(make_nodes(values, "TreeNode", TreeNode)) == as_tuples(tree)


@given(st.lists(st.integers() | st.none()))
def test_linked_lists_come_back_from_their_values(values):
    head = make_nodes(values, "ListNode", ListNode)
    assert values_of(head, "ListNode") == values
    assert (head is None) == (values == [])


def test_the_level_order_of_leetcode():
    root = make_nodes([5, 4, 8, 11, None, 13, 4, 7, 2, None, None, None, 1], "TreeNode", TreeNode)
    assert (root.left.left.right.val, root.left.right, root.right.right.right.val) == (2, None, 1)
    assert find_node(root, "TreeNode", 13) is root.right.left
    assert find_node(root, "TreeNode", 99) is None
    assert make_nodes([None], "TreeNode", TreeNode) is None


def test_nodes_in_a_circle_are_an_error():
    node, tree = ListNode(1), TreeNode(1)
    node.next, tree.left = node, tree
    for first in (node, tree):
        with pytest.raises(ValueError, match="cycle"):
            values_of(first, node_kind(first))


def test_what_is_a_node():
    class Own:
        val = left = right = None

    Own.__name__ = "TreeNode"
    other = type("TreeNode", (), {"data": 1, "left": None, "right": None})
    assert (node_kind(TreeNode()), node_kind(ListNode()), node_kind(Own())) == ("TreeNode", "ListNode", "TreeNode")
    assert [node_kind(value) for value in (other(), [1], None, NODES, object())] == [None] * 5
    target = ListNode(0)
    copy_node(ListNode(1, ListNode(2)), target, "ListNode")
    assert values_of(target, "ListNode") == [1, 2]
