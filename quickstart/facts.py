"""The facts behind the quick start's data: one table per kind of thing, one thing per line, fields divided by `|`.

Fields are pieces of sentences: the templates in make_data.py say which sentences they must fit.
"""

# name | capital | region | language | currency | neighbours or seas around it | known for
COUNTRY = """
Spain|Madrid|southwestern Europe|Spanish|the euro|Portugal and France|flamenco dancing, the Alhambra and late dinners
Portugal|Lisbon|the west of the Iberian peninsula|Portuguese|the euro|Spain alone|fado songs, cork forests and custard tarts
Italy|Rome|southern Europe|Italian|the euro|France, Switzerland, Austria and Slovenia|the Colosseum, opera and the canals of Venice
Germany|Berlin|central Europe|German|the euro|nine countries, among them Poland and Denmark|Christmas markets, castles on the Rhine and motor cars
Poland|Warsaw|central Europe|Polish|the zloty|Germany, Czechia and Ukraine|the salt mine of Wieliczka, amber and the music of Chopin
Greece|Athens|the southern Balkans|Greek|the euro|Albania, Bulgaria and Turkey|the Parthenon, thousands of islands and ancient theatres
Norway|Oslo|Scandinavia|Norwegian|the Norwegian krone|Sweden, Finland and Russia|fjords, stave churches and the midnight sun
Finland|Helsinki|northern Europe|Finnish and Swedish|the euro|Sweden, Norway and Russia|saunas, tens of thousands of lakes and the Moomins
Hungary|Budapest|central Europe|Hungarian|the forint|Austria, Slovakia and Romania|thermal baths, paprika and Lake Balaton
Romania|Bucharest|southeastern Europe|Romanian|the leu|Hungary, Bulgaria and Ukraine|painted monasteries, Transylvania and the Danube delta
Morocco|Rabat|the northwestern corner of Africa|Arabic and Berber|the dirham|Algeria and Mauritania|the souks of Marrakesh, tanneries and mint tea
Kenya|Nairobi|eastern Africa|Swahili and English|the Kenyan shilling|Tanzania, Uganda and Ethiopia|safaris in the Maasai Mara and long-distance runners
Ethiopia|Addis Ababa|the Horn of Africa|Amharic|the birr|Kenya, Sudan and Somalia|the rock churches of Lalibela and its coffee ceremony
Nigeria|Abuja|western Africa|English|the naira|Benin, Niger and Cameroon|Afrobeat, a huge film industry and the Benin bronzes
Namibia|Windhoek|southwestern Africa|English|the Namibian dollar|Angola, Botswana and South Africa|the red dunes of Sossusvlei and the Skeleton Coast
India|New Delhi|southern Asia|Hindi and English|the rupee|Pakistan, Nepal and Bangladesh|the Taj Mahal, cricket and Bollywood films
Nepal|Kathmandu|the Himalayas|Nepali|the Nepalese rupee|China and India|Mount Everest, Sherpa guides and the birthplace of the Buddha
Japan|Tokyo|the western Pacific|Japanese|the yen|only the sea|cherry blossom, bullet trains and sumo wrestling
South Korea|Seoul|the south of the Korean peninsula|Korean|the won|North Korea|pop bands, hanbok dress and kimchi
Mongolia|Ulaanbaatar|the steppes of inner Asia|Mongolian|the tugrik|Russia and China|nomads in felt tents and eagle hunters
Vietnam|Hanoi|southeastern Asia|Vietnamese|the dong|China, Laos and Cambodia|Ha Long Bay, conical hats and motor scooters
Indonesia|Jakarta|the great archipelago of southeastern Asia|Indonesian|the rupiah|Malaysia and Papua New Guinea|the temple of Borobudur, Bali and batik
Iran|Tehran|western Asia|Persian|the rial|Iraq, Turkey and Afghanistan|carpets, the ruins of Persepolis and tiled mosques
Jordan|Amman|the Middle East|Arabic|the Jordanian dinar|Syria, Iraq and Saudi Arabia|the rose-red city of Petra and the desert of Wadi Rum
Mexico|Mexico City|the south of North America|Spanish|the Mexican peso|the United States, Guatemala and Belize|the Day of the Dead, Maya pyramids and mariachi bands
Cuba|Havana|the Caribbean|Spanish|the Cuban peso|no one, being an island|cigars, rumba and old American cars
Colombia|Bogota|the northwest of South America|Spanish|the Colombian peso|Venezuela, Brazil, Ecuador and Panama|emeralds, cumbia and the old walls of Cartagena
Brazil|Brasilia|the east of South America|Portuguese|the real|almost every other country of its continent|carnival, samba and the Amazon rainforest
Argentina|Buenos Aires|the south of South America|Spanish|the Argentine peso|Chile, Bolivia and Uruguay|tango, gauchos and the glaciers of Patagonia
New Zealand|Wellington|the southwestern Pacific|English and Maori|the New Zealand dollar|only the sea|the haka, hobbit film sets and kiwi birds
"""

# name | symbol | atomic number | kind | used to | name or discovery (predicate)
ELEMENT = """
Helium|He|2|a light noble gas|fill balloons and cool the magnets of scanners|was first noticed in the spectrum of the Sun
Lithium|Li|3|a soft alkali metal that floats on oil|build rechargeable batteries|is called after the Greek word for stone
Carbon|C|6|a nonmetal found as diamond and graphite|make pencils, steel and all plastics|is the backbone of every living molecule
Oxygen|O|8|the gas that lets things burn|help patients breathe and cut steel with flames|was found by Scheele and by Priestley
Fluorine|F|9|a pale yellow and most aggressive halogen|coat pans and harden teeth|killed or hurt several of the chemists who tried to isolate it
Neon|Ne|10|a noble gas that glows orange|light advertising signs|takes its name from the Greek word for new
Sodium|Na|11|a soft metal that reacts wildly with water|make street lamps glow yellow|was won by Humphry Davy from caustic soda
Magnesium|Mg|12|a light metal that burns with a white glare|make flares and light alloys|is called after a district of Greece
Aluminium|Al|13|a light silvery metal|make cans, foil and aircraft|was once dearer than gold
Silicon|Si|14|a grey semiconductor|make computer chips and solar cells|is the main part of sand next to oxygen
Chlorine|Cl|17|a green and poisonous halogen|clean swimming pools and bleach cloth|was the first poison gas of the First World War
Argon|Ar|18|the commonest of the noble gases|shield metal while it is welded|takes its name from the Greek word for lazy
Potassium|K|19|an alkali metal that burns violet|feed crops|was won from potash, the ash of plants
Calcium|Ca|20|an alkaline earth metal of bones and shells|make cement and plaster|comes from the Latin word for lime
Titanium|Ti|22|a strong metal that does not rust|make hip joints and jet engines|is called after the giants of Greek myth
Chromium|Cr|24|a hard and shiny metal|plate bumpers and keep steel stainless|is called after colour, for its bright salts
Iron|Fe|26|the metal at the core of the Earth|make steel for bridges and ships|was first taken from meteorites
Cobalt|Co|27|a magnetic metal of blue glass|colour porcelain blue|is called after the goblins that German miners blamed
Nickel|Ni|28|a silvery magnetic metal|make coins and guitar strings|was named by miners after Old Nick, the devil
Gallium|Ga|31|a metal that melts in the hand|make light-emitting diodes|was foretold by Mendeleev as eka-aluminium
Arsenic|As|33|a notorious poison|kill rats and colour wallpaper green in old days|was the favourite weapon of the Borgias
Bromine|Br|35|a brown liquid halogen|slow down fires in furniture|is called after the Greek word for stench
Tin|Sn|50|a soft white metal|line food cans and make solder|was shipped from Cornwall in antiquity
Iodine|I|53|a dark solid that gives violet vapour|clean wounds and keep the thyroid well|was found by Courtois in seaweed ash
Tungsten|W|74|the metal with the highest melting point|make filaments and drills|means heavy stone in Swedish
Gold|Au|79|a heavy yellow metal that never tarnishes|make wedding rings and coat visors|drew crowds to California in 1849
Mercury|Hg|80|the only metal liquid in a cool room|fill old thermometers|was called quicksilver for its liveliness
Lead|Pb|82|a soft, dense and poisonous metal|shield against X-rays|gave plumbers their name
Radium|Ra|88|a rare radioactive metal|paint watch dials that glow at night|was discovered by Marie and Pierre Curie
Uranium|U|92|a very heavy radioactive metal|fuel nuclear power stations|is called after a planet found eight years before it
"""

# name | what it is | where it lives | what it eats | what is special (predicate)
ANIMAL = """
giant panda|a bear in black and white|misty mountains of China|bamboo|spends most of the day chewing
African elephant|the heaviest animal on land|savannas and forests of Africa|grass, bark and fruit|cools itself with its enormous ears
hippopotamus|a bulky river mammal|rivers and lakes of Africa|grass, grazed at night|sweats a red oil that protects it from the sun
cheetah|a slim spotted cat|open plains of Africa|gazelles|runs faster than any other land animal
tiger|the largest of the cats|jungles of India and the forests of Siberia|deer and wild boar|wears stripes that no other of its kind shares
platypus|a mammal that lays eggs|creeks of eastern Australia|worms and shrimps|has a bill like a duck and a venomous spur
wombat|a stout burrowing marsupial|southern Australia|roots and grasses|leaves droppings in the shape of cubes
ostrich|the largest living bird|dry plains of Africa|seeds and shoots|cannot fly but outruns a horse
barn owl|a pale owl with a heart-shaped face|farmland on most continents|mice and voles|hunts in complete darkness by ear
Arctic tern|a white seabird|coasts of the far north and far south|small fish|sees two summers a year by flying from pole to pole
albatross|a seabird with immense wings|windy southern oceans|squid|glides for hours without a single wingbeat
flamingo|a pink wading bird|salty lagoons|algae and brine shrimps|feeds with its head upside down
cuckoo|a grey bird with a well-known call|woods and reeds of Europe and Asia|hairy caterpillars|lays its eggs in the nests of others
chameleon|a slow lizard with rolling eyes|trees of Madagascar and Africa|insects|changes colour and shoots out its tongue
giant tortoise|a reptile that can outlive people|the Galapagos Islands|cactus and grass|can go for a year without food
green anaconda|the heaviest of the snakes|swamps of the Amazon|capybaras and caimans|squeezes its prey to death
axolotl|a salamander that never grows up|canals near Mexico City|worms and small fish|grows lost legs again
blue whale|the largest animal that ever lived|all great oceans|krill by the ton|has a heart the size of a small car
bottlenose dolphin|a clever grey sea mammal|warm and mild seas|fish|calls its friends by signature whistles
sea otter|a furry hunter among the kelp|the Pacific coast of North America|sea urchins and clams|cracks shells with a stone on its belly
walrus|a heavy sea mammal with tusks|Arctic shores|clams|hauls itself onto the ice with its teeth
great white shark|a feared hunting fish|cool coastal seas|seals and tuna|smells a drop of blood from far away
seahorse|a fish that swims upright|seagrass beds and coral reefs|plankton|lets the father carry the young
clownfish|an orange reef fish with white bands|Pacific reefs|algae and plankton|hides among the stings of anemones
Atlantic salmon|a silver fish|the northern ocean and its rivers|insects, later herring|leaps up waterfalls to the stream of its birth
leafcutter ant|a farming ant|tropical America|a fungus that it grows itself|carries green pieces above its head like parasols
camel|a beast of burden with humps|deserts of Asia and Africa|thorny shrubs|stores fat on its back and closes its nostrils
beaver|a large gnawing rodent|rivers of the northern forests|bark and twigs|fells trees and builds dams
hedgehog|a small animal covered with spines|gardens and hedges of Europe|slugs and beetles|rolls into a ball when it is alarmed
fruit bat|a flying mammal with the face of a fox|warm forests of Asia and Africa|figs and mangoes|finds its way by eyes and nose rather than by echo
"""

# name | inventor | year | country | what it does (predicate) | one more sentence
INVENTION = """
telephone|Alexander Graham Bell|1876|the United States|carries the voice along a wire|The first words called an assistant named Watson.
phonograph|Thomas Edison|1877|the United States|records sound in a groove and plays it again|The first recording was a nursery rhyme about a lamb.
steam locomotive|Richard Trevithick|1804|Wales|pulls wagons over rails with the force of steam|On its first trip it carried iron and seventy men.
safety lamp|Humphry Davy|1815|England|gives miners light without exploding the gas|A fine wire gauze surrounds the flame.
stethoscope|Rene Laennec|1816|France|lets a doctor listen to heart and lungs|The first one was a rolled sheet of paper.
electric motor|Michael Faraday|1821|England|turns current into rotation|A wire circled a magnet in a bowl of mercury.
mechanical reaper|Cyrus McCormick|1831|the United States|cuts grain in the field|One machine did the work of several men with scythes.
vulcanised rubber|Charles Goodyear|1839|the United States|stays elastic in heat and cold|Rubber and sulfur fell on a hot stove together.
safety pin|Walter Hunt|1849|the United States|fastens cloth without pricking|The patent was sold for four hundred dollars.
pasteurisation|Louis Pasteur|1864|France|kills germs in milk and wine by gentle heat|It was found during work for winemakers.
light bulb|Joseph Swan and Thomas Edison|1879|England and the United States|makes a thin thread glow in a glass without air|The early threads were of charred bamboo.
motor car|Carl Benz|1885|Germany|drives on the road with a petrol engine|His wife Bertha made the first long journey with it.
dishwasher|Josephine Cochrane|1886|the United States|cleans plates with jets of hot water|She was tired of seeing her china chipped.
pneumatic tyre|John Boyd Dunlop|1888|Ireland|cushions the wheel with air|He made it for the tricycle of his son.
zip fastener|Gideon Sundback|1913|the United States|closes clothes with two rows of teeth|It first became popular on boots and pouches.
diesel engine|Rudolf Diesel|1893|Germany|lights its fuel by pressure and without a spark|It moves most ships and lorries.
cinematograph|Auguste and Louis Lumiere|1895|France|takes and shows moving pictures|One of the first films showed a train at a station.
vacuum cleaner|Hubert Cecil Booth|1901|England|sucks the dust out of carpets|The first was as big as a cart and drawn by horses.
air conditioning|Willis Carrier|1902|the United States|cools rooms and dries their air|It was built to keep paper flat at a printing works.
tea bag|Thomas Sullivan|1908|the United States|brews one cup without loose leaves|Customers dipped his silk sample pouches by mistake.
assembly line|Henry Ford|1913|the United States|brings the work to the worker on a moving belt|It made a cheap black car possible.
traffic light|Garrett Morgan|1923|the United States|tells drivers at a crossing when to wait|He sold the rights to General Electric.
jet engine|Frank Whittle and Hans von Ohain|the 1930s|England and Germany|drives aircraft with a stream of hot gas|Two men had the idea without knowing of each other.
ballpoint pen|Laszlo Biro|1938|Hungary|writes with a small rolling ball|Its ink dries as fast as that of newspapers.
hook-and-loop tape|George de Mestral|1941|Switzerland|sticks and comes apart with a ripping noise|Burrs in the coat of his dog gave him the idea.
microwave oven|Percy Spencer|1945|the United States|heats food with radio waves|A chocolate bar had melted in his pocket near a radar.
transistor|Bardeen, Brattain and Shockley|1947|the United States|switches currents in a crystal|It replaced the glass valves of radios.
seat belt with three points|Nils Bohlin|1959|Sweden|holds car passengers in a crash|The maker let all rivals use the patent free.
laser|Theodore Maiman|1960|the United States|makes a narrow beam of pure light|The first one was a rod of ruby.
World Wide Web|Tim Berners-Lee|1989|Switzerland|links documents over the internet|It began at a laboratory for particle physics.
"""

# name | family | how it sounds (predicate) | where it is at home (predicate) | what is special (predicate)
INSTRUMENT = """
violin|bowed string instrument|sings when a bow of horsehair is drawn over four strings|leads every symphony orchestra|was brought to perfection by Stradivari in Cremona
cello|bowed string instrument|has a voice close to that of a man|stands on a spike between the knees|owes six famous suites to Bach
double bass|bowed string instrument|growls at the bottom of the orchestra|is mostly plucked in jazz|is taller than most of its players
harp|plucked string instrument|sounds when both hands pull its many strings|is an emblem of Ireland|changes key with seven pedals
guitar|plucked string instrument|has six strings and wooden frets|is at home in flamenco and in pop|was taken from Spain to the whole world
banjo|plucked string instrument|twangs over a stretched skin|drives bluegrass bands|descends from gourds that enslaved Africans brought along
mandolin|plucked string instrument|trembles with pairs of wire strings|serenades people in Naples|is tuned like a violin
koto|plucked string instrument|is played with picks on thirteen strings over movable bridges|is the national instrument of Japan|lies on the floor like a long box
balalaika|plucked string instrument|rings with three strings on a triangle of wood|belongs to Russian folk music|is built in sizes up to a giant bass
ukulele|plucked string instrument|strums four short nylon strings|brings to mind the beaches of Hawaii|has a name that means jumping flea
erhu|bowed string instrument|wails on two strings with the bow between them|plays melodies in Chinese opera|is covered with the skin of a python
piano|keyboard instrument|strikes its strings with felt hammers|stands in concert halls and living rooms|was invented by Cristofori in Florence
harpsichord|keyboard instrument|plucks its strings with quills|ruled the music of the Baroque|cannot play louder when the keys are hit harder
accordion|free-reed instrument|breathes with bellows between two hands|animates dances from Paris to Texas|has buttons for whole chords
concertina|free-reed instrument|is squeezed in a small box with six sides|was loved by sailors|was patented by the physicist Charles Wheatstone
clarinet|woodwind instrument|vibrates with a single reed on a black tube|opens the Rhapsody in Blue with a slide|was developed by Denner in Nuremberg
bassoon|woodwind instrument|grumbles through a long folded tube|often plays the clown of the orchestra|was the grandfather in Peter and the Wolf
saxophone|woodwind instrument|is a brass cone with a reed|became the voice of jazz|was invented by a Belgian named Adolphe
recorder|woodwind instrument|whistles through a block in its mouthpiece|is the first instrument of many schoolchildren|was hardly played for a hundred and fifty years
bagpipe|woodwind instrument|drones from a bag pressed by the arm|marches ahead of Highland regiments|can be heard for miles
didgeridoo|wind instrument|drones while the player breathes in a circle|comes from northern Australia|is hollowed out by termites
pan flute|wind instrument|joins tubes of different lengths|echoes in the Andes and in Romania|is called after a Greek god with goat feet
trombone|brass instrument|changes notes with a slide|announces the Last Judgement in many a requiem|was formerly called sackbut
French horn|brass instrument|rounds its tone with a hand in the bell|recalls the hunt in the forest|would be four metres long if unrolled
tuba|brass instrument|has the deepest voice of all brass|carries the weight in marching bands|was patented in Berlin in 1835
kettledrum|percussion instrument|gives tuned notes on a bowl of copper|came to Europe on the backs of horses|is retuned with a pedal
xylophone|percussion instrument|clacks with mallets on wooden bars|plays the skeletons of Saint-Saens|takes its name from Greek words for wood and voice
steel pan|percussion instrument|rings from dents hammered into an oil drum|was born in Trinidad|crowns the Caribbean carnival
castanet|percussion instrument|clicks in the palm of the hand|accompanies Spanish dancers|is named for the chestnut that it looks like
gamelan|ensemble of bronze gongs|shimmers with many players striking metal|plays for shadow puppets on Java|fascinated Debussy at a world fair
"""

# name | country | what it is | chief ingredients | how it is served or made (predicate)
DISH = """
paella|Spain|a pan of saffron rice|rabbit, beans or seafood|is cooked over an open fire near Valencia
gazpacho|Spain|a cold vegetable soup|tomatoes, cucumber and garlic|is drunk in the heat of Andalusia
ratatouille|France|a vegetable stew|aubergines, courgettes and peppers|simmers in the kitchens of Provence
bouillabaisse|France|a fish soup|rockfish, fennel and saffron|comes in two courses at the port of Marseille
quiche lorraine|France|an open tart|eggs, cream and bacon|is eaten warm with a green salad
carbonara|Italy|a plate of pasta|eggs, pecorino and cured pork cheek|must never see cream, say the Romans
tiramisu|Italy|a layered dessert|mascarpone, coffee and sponge fingers|is dusted with cocoa and chilled
pesto|Italy|a green sauce|basil, pine nuts and cheese|is pounded in a marble mortar in Genoa
Wiener schnitzel|Austria|a thin breaded cutlet|veal and crumbs|hangs over the edge of the plate
sauerkraut|Germany|a sour winter vegetable|cabbage and salt|ferments for weeks in a crock
pierogi|Poland|a plate of filled dumplings|potato, cheese or mushrooms|is boiled and then fried in butter
borscht|Ukraine|a crimson soup|beetroot and cabbage|is crowned with sour cream
moussaka|Greece|a baked casserole|aubergines, minced lamb and white sauce|rests before it is cut in squares
baklava|Turkey|a sticky pastry|pistachios, thin leaves of dough and syrup|is cut into diamonds
falafel|Egypt|a snack of crisp fried balls|beans and herbs|is stuffed into pita pockets
injera|Ethiopia|a sour pancake|teff flour|serves as plate and spoon at once
biryani|India|a fragrant rice|basmati, spices and chicken|is sealed in a pot with dough
dosa|India|a crisp pancake|fermented lentils and rice|comes with coconut chutney for breakfast
momo|Nepal|a steamed parcel|minced buffalo or vegetables|is dipped in hot tomato chutney
Peking duck|China|a roasted bird with glassy skin|duck, maltose and pancakes|is carved at the table
mapo tofu|China|a fiery bean curd|tofu, chilli and numbing pepper|honours an old woman of Sichuan
ramen|Japan|a bowl of noodles|wheat noodles, pork broth and egg|is slurped loudly at the counter
kimchi|South Korea|a hot pickle|cabbage, chilli and radish|ripens in jars and appears at each meal
pho|Vietnam|a clear noodle soup|rice noodles, beef and star anise|is eaten in the street at dawn
pad thai|Thailand|a plate of fried noodles|tamarind, peanuts and shrimps|sizzles in a wok at night markets
rendang|Indonesia|a dry curry|beef and coconut milk|keeps for weeks after hours of cooking
laksa|Malaysia|a spicy soup|noodles, prawns and coconut|differs from town to town
guacamole|Mexico|a green mash|avocado, lime and coriander|is older than the Spanish conquest
mole poblano|Mexico|a dark sauce|chillies, nuts and chocolate|covers turkey at weddings
smorrebrod|Denmark|an open sandwich|rye bread and herring|is eaten with knife and fork
"""

# name | where it begins | lands or towns along it | where it ends | what is special (predicate)
RIVER = """
Nile|the lakes of eastern Africa and the highlands of Ethiopia|Sudan and Egypt|the Mediterranean Sea|made the desert fertile by its yearly flood
Amazon|the Andes of Peru|the rainforest of Brazil|the Atlantic Ocean|carries more water than any other
Mississippi|a small lake in Minnesota|Saint Louis and Memphis|the Gulf of Mexico|is the river of Mark Twain and the paddle steamers
Colorado|the Rocky Mountains|Utah and Arizona|the Gulf of California|carved the Grand Canyon
Yukon|British Columbia|the gold fields of the Klondike|the Bering Sea|freezes for more than half the year
Rio Grande|the mountains of Colorado|Albuquerque and El Paso|the Gulf of Mexico|forms the border between Texas and Mexico
Orinoco|the highlands of Guiana|the grassy llanos of Venezuela|the Atlantic Ocean|shares some of its water with the Amazon
Parana|the plateau of Brazil|Paraguay and Argentina|the estuary of the Plate|drives the great power station of Itaipu
Thames|the Cotswold hills|Oxford and London|the North Sea|has a silver barrier against storm floods
Loire|the Massif Central|Orleans and Tours|the Bay of Biscay|is lined with royal castles
Rhone|a glacier in Switzerland|Geneva and Lyon|the Mediterranean Sea|reaches the sea among white horses and flamingos
Elbe|the Giant Mountains of Bohemia|Dresden and Hamburg|the North Sea|is a port for great ships a hundred kilometres inland
Danube|the Black Forest|Vienna, Budapest and Belgrade|the Black Sea|touches ten countries and inspired a blue waltz
Vistula|the Beskid mountains|Krakow and Warsaw|the Baltic Sea|is called the queen of Polish rivers
Dnieper|bogs west of Moscow|Smolensk and Kyiv|the Black Sea|was the road of the Vikings to Byzantium
Po|the Cottian Alps|Turin and the plain of Lombardy|the Adriatic Sea|waters the rice fields of northern Italy
Tiber|the Apennines|Umbria and Rome|the Tyrrhenian Sea|carried the basket of Romulus and Remus
Tagus|the hills of eastern Spain|Toledo and Lisbon|the Atlantic Ocean|is the longest of the Iberian peninsula
Ebro|the Cantabrian mountains|Zaragoza|the Mediterranean Sea|ends in a delta full of rice
Congo|the highlands of Zambia|Kisangani and Kinshasa|the Atlantic Ocean|is the deepest river and crosses the equator twice
Zambezi|the northwest of Zambia|Zimbabwe and Mozambique|the Indian Ocean|plunges over Victoria Falls
Orange|the mountains of Lesotho|the dry Northern Cape|the Atlantic Ocean|washed the first diamonds of South Africa
Euphrates|the Armenian highlands|Syria and the ruins of Babylon|the Persian Gulf|was the western arm of Mesopotamia
Jordan|springs below Mount Hermon|the Sea of Galilee|the Dead Sea|ends at the lowest place on dry land
Indus|the plateau of Tibet|Kashmir and Punjab|the Arabian Sea|gave India its name
Brahmaputra|a glacier in Tibet|Assam and Bangladesh|the Bay of Bengal|turns sharply round the end of the Himalayas
Yellow River|the Bayan Har mountains|the loess plateau|the Bohai Sea|is coloured by dust and is called the sorrow of China
Amur|two streams that meet east of Lake Baikal|the border of Russia and China|the Sea of Okhotsk|is named after a black dragon by the Chinese
Lena|the mountains beside Lake Baikal|Yakutsk|the Arctic Ocean|thaws so late that people drive on it into May
Murray|the Snowy Mountains|the fruit farms of Victoria|the Southern Ocean|is the longest of Australia
"""

# name | height in metres | where | first climb or ascent (predicate) | what is special (predicate)
MOUNTAIN = """
Mount Everest|8,849|on the border of Nepal and Tibet|was first climbed by Hillary and Tenzing in 1953|is the highest point on Earth
Kangchenjunga|8,586|between Nepal and Sikkim|was first climbed by a British party in 1955|is left untouched on its last metres for religious reasons
Annapurna|8,091|in central Nepal|was first climbed by Herzog and Lachenal in 1950|was the first of the eight-thousanders to be won
Nanga Parbat|8,126|at the western end of the Himalayas|was first climbed by Hermann Buhl alone in 1953|has the highest rock wall in the world
Mont Blanc|4,806|on the border of France and Italy|was first climbed by Balmat and Paccard in 1786|is a white dome with a road tunnel below it
Matterhorn|4,478|above Zermatt in Switzerland|was first climbed by Whymper's party in 1865|looks like a crooked pyramid
Zugspitze|2,962|on the border of Bavaria and Tyrol|was first climbed by a surveyor in 1820|is the highest place in Germany
Triglav|2,864|in the Julian Alps|was first climbed by four local men in 1778|stands on the flag of Slovenia
Mount Olympus|2,918|in northern Greece|was first climbed by Kakkalos and two Swiss in 1913|was the home of Zeus and his family
Ben Nevis|1,345|near Fort William in Scotland|was climbed by a botanist in 1771|is the highest summit of Britain
Mount Elbrus|5,642|in the Caucasus|had its lower top climbed by a guide named Killar in 1829|is a sleeping volcano with two summits
Mount Ararat|5,137|in the east of Turkey|was first climbed by Parrot and Abovian in 1829|is where the Ark of Noah is said to have landed
Etna|3,400|on the east coast of Sicily|has been climbed since antiquity, also by the emperor Hadrian|is the most active volcano in Europe
Vesuvius|1,281|above the Bay of Naples|can be climbed by a path and a former funicular|buried Pompeii in the year 79
Teide|3,715|on the island of Tenerife|can be reached by cable car|is the highest peak of Spain
Kilimanjaro|5,895|in Tanzania|was first climbed by Hans Meyer in 1889|bears ice almost on the equator
Mount Kenya|5,199|in the highlands north of Nairobi|was first climbed by Mackinder in 1899|gave its name to a republic
Mount Fuji|3,776|southwest of Tokyo|is climbed by thousands each July|was drawn thirty-six times by Hokusai
Krakatoa|813|in the strait between Java and Sumatra|is seldom climbed for fear of its young cone|exploded in 1883 and was heard thousands of kilometres away
Denali|6,190|in Alaska|was first climbed by Stuck's party in 1913|is the highest of North America and was long called McKinley
Mount Saint Helens|2,549|in the state of Washington|lost its top, so that climbers now end at a crater rim|blew out sideways in 1980
Mauna Kea|4,207|on Hawaii|can be driven up by road|is the tallest when measured from the bottom of the sea
Popocatepetl|5,393|southeast of Mexico City|was climbed by men of Cortes in search of sulfur|has an Aztec name that means smoking mountain
Cotopaxi|5,897|south of Quito|was first climbed by Reiss and Escobar in 1872|is an almost perfect cone of ice and fire
Aconcagua|6,961|in the Andes of Argentina|was first climbed by Zurbriggen in 1897|is the highest outside Asia
Sugarloaf Mountain|396|at the entrance of the bay of Rio|was first climbed by Henrietta Carstairs in 1817|is reached by two cable cars
Aoraki|3,724|on the South Island of New Zealand|was first climbed by three locals at Christmas 1894|is also called Mount Cook
Uluru|863|in the red centre of Australia|has been closed to climbers since 2019|is a sacred rock that changes colour at sunset
Mount Erebus|3,794|on Ross Island in Antarctica|was first climbed by Shackleton's men in 1908|keeps a lake of lava among the ice
Vinson Massif|4,892|in Antarctica|was first climbed by Americans in 1966|is the highest of its frozen continent
"""
