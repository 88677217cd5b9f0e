import xml.etree.ElementTree

from flipproof import pictures
from flipproof.measure.arms import Cost
from flipproof.report import figures


def test_an_svg_is_equal_for_equal_data_well_formed_and_escapes_names():
    costs = {"$x_1$ </svg> <script>": Cost(1.0, (0.5, 1.5)), "-- & -->": Cost(2.0, None)}
    first, second = (pictures.svg(figures.cost_bars(costs, 2.0), "figure-1", 'Costs of "a" & <b>') for _ in range(2))
    assert first == second
    text = "{http://www.w3.org/2000/svg}text"
    assert set(costs) <= {element.text for element in xml.etree.ElementTree.fromstring(first).iter(text)}
    assert xml.etree.ElementTree.fromstring(first).get("aria-label") == 'Costs of "a" & <b>'
    other = pictures.svg(figures.cost_bars(costs, 2.0), "figure-2", "Costs")
    ids = [
        {element.get("id") for element in xml.etree.ElementTree.fromstring(svg).iter()} - {None}
        for svg in (first, other)
    ]
    assert ids[0]
    assert not ids[0] & ids[1]
    assert not [colour for colour in pictures._COLOURS if colour in first]  # all are the page's
