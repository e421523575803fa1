"""Tables of a card, from results."""

from __future__ import annotations

from nc_hf.card_tables import geometry_table


def test_an_angle_is_beside_the_best_one_of_its_own_split():
    """A split that lacks classes can reach a wider one."""
    train = {"nc2_min_angle": 80.8, "nc2_best_angle": 104.5, "nc4_agreement": 0.5}
    test = train | {"nc2_min_angle": 105.1, "nc2_best_angle": 120.0}
    (name, angles), agreement = geometry_table({"geometry": {"base": {"train": train, "test": test}}})["rows"]
    assert name.endswith("(degrees)") and angles == ("80.8 of 104.5", "105 of 120.0")
    assert agreement[1] == ("0.5", "0.5")
    (name, angles), _ = geometry_table({"geometry": {"base": {"train": train, "test": train}}})["rows"]
    assert name.endswith("(degrees; at best 104.5)") and angles == ("80.8", "80.8")


def test_the_geometry_that_heads_share_is_shown_once():
    shared = {"nc1_variability_balanced": 0.3, "nc2_norm_cov": 0.1, "nc4_agreement": 0.9}
    geometry = {head: {"train": shared | {"nc3_duality_gap": gap}} for head, gap in (("base", 0.25), ("crt", 0.5))}
    rows = geometry_table({"geometry": geometry})["rows"]
    assert [name[:3] for name, _ in rows] == ["NC1", "NC2", "NC3", "NC3", "NC4"]
    assert ("NC3, distance of head and class means, `base`", ["0.25"]) in rows
    assert ("NC3, distance of head and class means, `crt`", ["0.5"]) in rows
