"""Facts and instructions that the texts of the built-in calibration set are made of."""

# What a topic is called in a question, then true sentences; the text may end after any of them from the third on.
TOPICS: tuple[tuple[str, tuple[str, ...]], ...] = (
    (
        "how bread rises",
        (
            "Yeast is a living fungus that feeds on the sugars in flour.",
            "As it feeds, it gives off carbon dioxide, and the gas is caught in the dough as bubbles.",
            "Kneading links the proteins of the flour into gluten, an elastic net that holds the bubbles.",
            "In a warm place the dough may double in size within an hour or two.",
            "In the oven the gas expands once more, and then the heat kills the yeast and sets the crumb.",
        ),
    ),
    (
        "why the sky is blue",
        (
            "Sunlight contains all colours of the rainbow.",
            "The molecules of the air scatter short waves far more strongly than long ones.",
            "Blue light is therefore spread over the whole sky and reaches our eyes from every direction.",
            "Violet is scattered even more, but the sun sends less of it and our eyes are less sensitive to it.",
            "At sunset the light travels a longer way through the air, the blue is lost on the way, and red remains.",
        ),
    ),
    (
        "how a bicycle stays upright",
        (
            "A moving bicycle that starts to lean also starts to turn its front wheel to the same side.",
            "That brings the wheels back under the centre of mass, much as one balances a broom on the hand.",
            "The rider does the rest with small movements that are hardly noticed.",
            "At low speed these corrections have to be large, which is why slow riding is difficult.",
            "The spinning wheels help a little, but they are not the main reason.",
        ),
    ),
    (
        "the water cycle",
        (
            "The sun warms seas, lakes and soil, and water evaporates into the air.",
            "Plants add to it by releasing vapour through their leaves.",
            "Rising air cools down, and the vapour condenses into the tiny drops of a cloud.",
            "When the drops grow heavy enough, they fall as rain, hail or snow.",
            "Part of the water runs off in rivers, part of it seeps into the ground and feeds springs.",
        ),
    ),
    (
        "how vaccines work",
        (
            "A vaccine shows the immune system a harmless part or a weakened form of a germ.",
            "Certain white blood cells recognize it and produce antibodies.",
            "Some of these cells live on for years as a memory of the meeting.",
            "If the real germ arrives later, the answer is fast enough to stop it before one falls seriously ill.",
            "A booster renews the memory when it begins to fade.",
        ),
    ),
    (
        "what a hash table is",
        (
            "A hash table stores pairs of keys and values.",
            "A hash function turns each key into a number, and that number selects a slot in an array.",
            "Looking up a key therefore takes about the same time however many entries there are.",
            "Two keys may fall into the same slot; the table then keeps a short list there or tries another slot.",
            "When the table becomes too full, it is copied into a larger array.",
        ),
    ),
    (
        "how bees make honey",
        (
            "Worker bees collect nectar from flowers and carry it home in a special stomach.",
            "In the hive they pass it from mouth to mouth and add enzymes that split its sugars.",
            "The thin syrup is spread over the comb, and the bees fan it with their wings until much water has gone.",
            "When it is thick enough to keep, the cell is closed with a lid of wax.",
            "A single bee makes only a fraction of a teaspoon in her life.",
        ),
    ),
    (
        "the history of the printing press",
        (
            "Printing with carved wooden blocks was common in East Asia many centuries ago.",
            "Movable type was invented in China in the eleventh century and later cast in metal in Korea.",
            "Around 1450 Johannes Gutenberg combined cast letters, oily ink and a screw press in Mainz.",
            "Within fifty years printers were at work in more than two hundred European towns.",
            "Books became cheaper, and news, maps and new ideas spread faster than ever before.",
        ),
    ),
    (
        "how tides come about",
        (
            "The moon pulls on the water of the oceans, and most strongly on the side that faces it.",
            "A second bulge of water forms on the opposite side of the earth.",
            "As the earth turns, most coasts pass through both bulges and see two high tides a day.",
            "When sun and moon pull along one line, at new and full moon, the tides are especially high.",
            "The shape of a bay can raise the difference between high and low water to more than ten metres.",
        ),
    ),
    (
        "why leaves change their colour in autumn",
        (
            "In summer the green of chlorophyll covers all other pigments of a leaf.",
            "When the days grow short, a tree breaks the chlorophyll down and keeps its valuable parts.",
            "Yellow and orange pigments, which were there all the time, come into view.",
            "Some trees also make red pigments in autumn from the sugar left in the leaf.",
            "At last a layer of cork closes the stem of the leaf, and it falls.",
        ),
    ),
    (
        "how a refrigerator cools",
        (
            "A fluid circulates through pipes inside and outside the refrigerator.",
            "Inside it evaporates at low pressure, which takes heat from the food.",
            "A compressor presses the vapour together, so that it becomes hot.",
            "In the coils at the back it gives this heat to the kitchen and turns liquid again.",
            "A narrow valve lets the pressure fall, and the cycle starts anew.",
        ),
    ),
    (
        "what inflation means",
        (
            "Inflation is a rise of prices in general, not of a single good.",
            "It is usually measured by the price of a fixed basket of things that households buy.",
            "If wages do not rise as fast, people can afford less with the same income.",
            "Central banks try to keep it low and steady, mostly by changing interest rates.",
            "A little inflation is considered normal; very high inflation makes saving and planning hard.",
        ),
    ),
    (
        "how glaciers shape the land",
        (
            "Where more snow falls than melts, it is pressed into ice over the years.",
            "Under its own weight the ice flows slowly downhill.",
            "Stones frozen into its base scrape the rock below like coarse sandpaper.",
            "A valley that was carved by a river has the form of a V; a glacier widens it to a U.",
            "Where the ice melts, it leaves ridges of rubble, called moraines, and often a lake behind them.",
        ),
    ),
    (
        "how the heart works",
        (
            "The heart is a hollow muscle with four chambers.",
            "The right half pumps blood to the lungs, where it takes up oxygen.",
            "The left half drives the blood from the lungs through the rest of the body.",
            "Valves between the chambers open in one direction only and cause the sound of the heartbeat.",
            "A small knot of cells sets the rhythm, about sixty to a hundred beats a minute at rest.",
        ),
    ),
    (
        "what version control is good for",
        (
            "A version control system records every state of a project together with a short message.",
            "One can compare two states line by line and go back to an earlier one.",
            "Several people can work on branches of their own and merge their changes later.",
            "If two of them changed the same line, the system reports a conflict and lets a person decide.",
            "The history also answers who changed what, when and, with good messages, why.",
        ),
    ),
    (
        "how to brew good tea",
        (
            "Use fresh water, and warm the pot before you begin.",
            "Black tea wants boiling water and three to five minutes.",
            "Green tea becomes bitter if the water is much hotter than eighty degrees.",
            "One level teaspoon of leaves for each cup is a good start.",
            "Take the leaves out when the time is over; a longer wait makes the tea harsh rather than strong.",
        ),
    ),
    (
        "why ships of steel float",
        (
            "A body in water is pushed up by a force equal to the weight of the water that it displaces.",
            "A solid block of steel displaces too little water and sinks.",
            "A hull is mostly full of air and displaces far more water than its steel alone would.",
            "It sinks in only until the displaced water weighs as much as the ship.",
            "If water fills the hull, the air is lost and with it the lift.",
        ),
    ),
    (
        "how languages change",
        (
            "No living language stands still.",
            "Sounds shift slowly, so that the spelling of a word may preserve how it was spoken centuries ago.",
            "Speakers borrow words from their neighbours together with the things that they name.",
            "Irregular forms that are rarely used tend to become regular.",
            "When groups lose contact, their dialects drift apart and may become languages of their own.",
        ),
    ),
    (
        "how solar cells produce electricity",
        (
            "Most solar cells are thin slices of silicon.",
            "Two layers are treated so that one has a surplus of electrons and the other a lack of them.",
            "When light strikes the cell, it knocks electrons loose.",
            "The field between the layers drives them to one side, and a current flows through the wire outside.",
            "Many cells are joined to a panel, and an inverter turns their current into the kind used at home.",
        ),
    ),
    (
        "what a healthy soil needs",
        (
            "Good soil is about half solid matter; the rest is air and water.",
            "Earthworms mix it and dig channels for roots and rain.",
            "Fungi and bacteria turn dead leaves into food for plants.",
            "Bare ground dries out and is washed away, so it helps to keep it covered.",
            "Growing different crops in turn keeps pests down and does not exhaust the same nutrients.",
        ),
    ),
    (
        "how a camera takes a picture",
        (
            "A lens gathers light and throws a sharp image onto the sensor.",
            "The aperture decides how much light comes in, and how deep the zone of sharpness is.",
            "The shutter decides for how long the sensor is exposed.",
            "Each tiny cell of the sensor counts the light that falls on it through a red, green or blue filter.",
            "Software computes the missing colours from the neighbours and compresses the result.",
        ),
    ),
    (
        "how rumours spread",
        (
            "People pass on a story when it is short, surprising and touches their feelings.",
            "Details get lost with each retelling, while the striking core is sharpened.",
            "Hearing something several times makes it feel true, even if the source is the same.",
            "A correction works best when it comes early and offers another explanation.",
            "It is wise to ask who could know such a thing in the first place.",
        ),
    ),
)

# A task, what it needs, its steps.
HOW_TO: tuple[tuple[str, tuple[str, ...], tuple[str, ...]], ...] = (
    (
        "plant a tomato",
        ("a pot", "soil", "a young plant", "a stick"),
        (
            "Fill the pot with soil and make a deep hole.",
            "Set the young plant in, deeper than it stood before.",
            "Press the soil down and water it well.",
            "Push the stick in and tie the stem loosely to it.",
            "Water in the morning, and never over the leaves.",
        ),
    ),
    (
        "change a bicycle tube",
        ("two tyre levers", "a new tube", "a pump"),
        (
            "Take the wheel out and let the air off.",
            "Lift one side of the tyre over the rim with the levers.",
            "Pull the old tube out and feel the tyre for thorns or glass.",
            "Pump a little air into the new tube and put it in.",
            "Push the tyre back by hand, pump it up and put the wheel in.",
        ),
    ),
    (
        "cook a simple lentil soup",
        ("a cup of lentils", "an onion", "two carrots", "a litre of stock"),
        (
            "Chop the onion and the carrots.",
            "Fry the onion in a little oil until it is soft.",
            "Add carrots, lentils and stock.",
            "Simmer for half an hour and stir now and then.",
            "Season with salt, pepper and a dash of vinegar.",
        ),
    ),
    (
        "back up photos",
        ("an external drive", "a cable"),
        (
            "Connect the drive and give it a clear name.",
            "Copy the folder with the photos to the drive.",
            "Open a few pictures from the copy to be sure that it works.",
            "Disconnect the drive safely and keep it in another room.",
            "Repeat this once a month.",
        ),
    ),
    (
        "prepare a short talk",
        ("a sheet of paper", "a watch"),
        (
            "Write down the one sentence that people should remember.",
            "Choose three points that support it, and drop the rest.",
            "Find an example for each point.",
            "Speak the whole talk aloud once and take the time.",
            "Cut until it is shorter than the time you have.",
        ),
    ),
)
